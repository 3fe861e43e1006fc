"""``nestlearn chat``: talk to a model with a memory, and let it learn from the conversation."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from nestlearn.cli.learner import open_learner
from nestlearn.cli.pretrained import Dtype

HELP = """/save      write the memory file
/reset     forget everything (the file stays until /save)
/undo      forget what was learned last
/status    what the memory holds
/freeze    stop learning, or go on
/clear     begin a new conversation
/learn T   learn the text T, or the file T
/quit      leave"""


@dataclass
class Chat:
    """Talk to a model with a memory. /help lists the commands."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder, .gguf file or Hugging Face id of the base model; it is never changed."""
    memory: Path
    """The memory file (*.nlmem)."""
    learn: bool = False
    """Learn from every exchange, and save when leaving."""
    lr: float | None = None
    """Learning rate (default: what suits the memory)."""
    repeats: int = 4
    """Gradient steps on each segment."""
    max_new_tokens: int = 200
    """Longest answer."""
    temperature: float = 0.0
    """Randomness of answers; 0 always takes the likeliest token."""
    dtype: Dtype = "auto"
    """Type of the weights."""
    device: str = "auto"
    """auto, cpu, cuda."""

    def run(self) -> int:
        """Talk until /quit or the end of the input."""
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"--temperature must be 0 or more, got {self.temperature}")
        self._learner = open_learner(
            self.model, self.memory, self.dtype, self.device, lr=self.lr, repeats=self.repeats
        )
        self._learner.freeze(not self.learn)
        self._turns: list[dict[str, str]] = []
        self._unsaved = False
        if sys.stdin.isatty():
            print("/help lists commands, /quit leaves.")
        try:
            while (line := _ask()) is not None:
                if not line.strip():
                    continue
                if line.startswith("/"):
                    if not self._command(line.strip()):
                        break
                else:
                    self._answer(line)
        except KeyboardInterrupt:
            print()
        if self._unsaved and self.learn:
            self._save()
        elif self._unsaved:
            print("not saved: what was learned since the last /save is gone")
        return 0

    def _answer(self, text: str) -> None:
        import torch
        from transformers import TextStreamer

        tokenizer, model = self._learner.tokenizer, self._learner.model
        self._turns.append({"role": "user", "content": text})
        ids = self._prompt()
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        settings: dict[str, Any] = {"do_sample": self.temperature > 0}
        if self.temperature > 0:
            settings["temperature"] = self.temperature
        with torch.no_grad():
            output = model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
                streamer=streamer,
                **settings,
            )
        answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
        self._turns.append({"role": "assistant", "content": answer})
        if not self._learner.frozen:
            # What the person said is learned; the model's own words would only confirm themselves.
            self._teach(text)

    def _prompt(self) -> Any:
        tokenizer = self._learner.tokenizer
        if getattr(tokenizer, "chat_template", None):
            ids = tokenizer.apply_chat_template(
                self._turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).input_ids
        else:
            lines = [f"{t['role'].capitalize()}: {t['content']}" for t in self._turns]
            ids = tokenizer("\n".join([*lines, "Assistant:"]), return_tensors="pt").input_ids
        limit = self._learner.limit - self.max_new_tokens
        if ids.shape[1] > limit and len(self._turns) > 1:
            print("(the conversation is longer than the model's context: its beginning is dropped)")
            del self._turns[: max(1, len(self._turns) // 2)]
            return self._prompt()
        return ids.to(self._learner.device)

    def _teach(self, documents: Any) -> None:
        done = self._learner.learn(documents, label="chat")
        self._unsaved = True
        print(f"(learned {done.tokens} tokens, surprise {done.loss:.2f})")

    def _command(self, line: str) -> bool:
        """Run a command; False to leave."""
        name, _, rest = line[1:].partition(" ")
        learner = self._learner
        if name in ("quit", "exit", "q"):
            return False
        if name == "save":
            self._save()
        elif name == "reset":
            learner.reset()
            self._unsaved = True
            print("everything is forgotten; the file stays as it is until /save")
        elif name == "undo":
            try:
                print(f"back to: {learner.undo()}")
                self._unsaved = True
            except ValueError as error:
                print(error)
        elif name == "status":
            counts = learner.memory.counts
            state = "frozen" if learner.frozen else "learning"
            print(f"{state}; {counts.get('tokens', 0):,} tokens of "
                  f"{counts.get('documents', 0):,} documents; "
                  f"{len(learner.memory.snapshots)} snapshots"
                  f"{'; not saved' if self._unsaved else ''}")  # fmt: skip
        elif name == "freeze":
            learner.freeze(not learner.frozen)
            print("learning stopped" if learner.frozen else "learning goes on")
        elif name == "clear":
            self._turns.clear()
        elif name == "learn" and rest:
            frozen = learner.frozen
            learner.freeze(False)
            try:
                self._teach(Path(rest) if Path(rest).exists() else rest)
            except (ValueError, OSError) as error:
                print(error)
            learner.freeze(frozen)
        else:
            print(HELP)
        return True

    def _save(self) -> None:
        print(f"{self.memory}: {self._learner.save(self.memory)}")
        self._unsaved = False


def _ask() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
