"""``nestlearn generate``: continue a prompt with a trained model, with or without memory."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from torch import Tensor

    from nestlearn.models.hope import HopeCache, HopeForCausalLM


@dataclass
class Generate:
    """Continue a prompt with a trained model; prints the continuation."""

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a saved model, or of a run of `nestlearn train`."""
    prompt: str = ""
    """Text to continue; "-" reads it from standard input."""
    max_new_tokens: int = 200
    """Tokens to generate at most."""
    temperature: float = 0.8
    """Randomness of sampling; 0 always takes the likeliest token."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that hold this share of the probability."""
    top_k: int = 0
    """Sample from this many likeliest tokens; 0: from all."""
    num_beams: int = 1
    """Search with this many beams instead of sampling."""
    seed: int | None = None
    """Seed of the sampling; the same seed gives the same text."""
    stream: bool = False
    """Print while generating."""
    memory: Path | None = None
    """State file: loaded if it exists, and saved after generating, so the next call remembers."""
    freeze: bool = False
    """Only read the memory: nothing is written to it and the state file stays as it is."""

    def run(self) -> int:
        """Generate and print; returns the exit status."""
        self._check()
        prompt = sys.stdin.read() if self.prompt == "-" else self.prompt
        if not prompt:
            raise ValueError('the prompt is empty; give --prompt "some text", or "-" and a pipe')

        import torch

        model, tokenizer = load(self.model)
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
        if self.seed is not None:
            torch.manual_seed(self.seed)
        cache = self._cache(model)
        before = None if cache is None else cache.copy()
        streamer = None
        if self.stream:
            from transformers import TextStreamer

            streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        output = model.generate(
            ids,
            past_key_values=cache,
            streamer=streamer,
            return_dict_in_generate=True,
            **self._settings(tokenizer),
        )
        new = output.sequences[:, ids.shape[1] :]
        if streamer is None:
            print(tokenizer.decode(new[0], skip_special_tokens=True))
        if self.memory is not None and not self.freeze and before is not None:
            # Beams fork the memory and the last token is never read: read the chosen text instead.
            kept = before if self.num_beams > 1 else output.past_key_values
            self._remember(model, kept, before.get_seq_length(), output.sequences)
        return 0

    def _check(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"--temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"--top-k must be 0 or more, got {self.top_k}")
        if self.num_beams < 1:
            raise ValueError(f"--num-beams must be at least 1, got {self.num_beams}")
        if self.stream and self.num_beams > 1:
            raise ValueError("--stream needs --num-beams 1: beams are only chosen at the end")
        if self.freeze and (self.memory is None or not self.memory.is_file()):
            raise ValueError("--freeze needs --memory with a state file that exists")
        if self.memory is not None and not self.memory.absolute().parent.is_dir():
            raise ValueError(
                f"--memory: no folder {self.memory.absolute().parent}; create it first"
            )

    def _settings(self, tokenizer: Any) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
            "do_sample": self.num_beams == 1 and self.temperature > 0,
            "pad_token_id": tokenizer.pad_token_id,
        }
        if settings["do_sample"]:
            settings |= {
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": self.top_k,
            }
        return settings

    def _cache(self, model: Any) -> HopeCache | None:
        if self.memory is None:
            return None
        from nestlearn.models.hope import HopeCache, HopePreTrainedModel

        if not isinstance(model, HopePreTrainedModel):
            raise ValueError(
                f"--memory needs a Hope model, {self.model} is a {type(model).__name__}"
            )
        if not self.memory.is_file():
            print(f"new memory: {self.memory}", file=sys.stderr)
            return HopeCache()
        cache = HopeCache.load(self.memory, model)
        if cache.batch_size != 1:
            raise ValueError(f"{self.memory} holds {cache.batch_size} rows; this command needs one")
        return cache.freeze() if self.freeze else cache

    def _remember(
        self, model: HopeForCausalLM, cache: HopeCache, seen: int, sequence: Tensor
    ) -> None:
        import torch

        assert self.memory is not None
        unread = sequence[:, cache.get_seq_length() - seen :]
        if unread.shape[1]:
            with torch.no_grad():
                model(unread, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.save(self.memory, model)


def load(folder: Path) -> tuple[Any, Any]:
    """Model (in evaluation mode, on the best device) and tokenizer of a saved folder.

    A folder of a training run stands for its final model, or the best or newest one so far.

    Raises:
        ValueError: no folder, no model in it, or no tokenizer.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}; train a model with `nestlearn train` first")
    folder = model_folder(folder)

    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    import nestlearn.models.hope  # noqa: F401  (registers the architecture)
    from nestlearn.train.tokenizers import load_tokenizer

    logging.disable_progress_bar()
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} holds no weights (no .safetensors file)")
    tokenizer = load_tokenizer(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model only "
            f"{model.config.vocab_size}"
        )
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def model_folder(folder: Path) -> Path:
    """The folder with the model in it: of a training run, the final, best or newest one.

    Raises:
        ValueError: there is none.
    """
    if (folder / "config.json").is_file():
        return folder
    steps = sorted(folder.glob("checkpoints/step-*"), reverse=True)
    for inside in (folder / "final", folder / "best", *steps):
        if (inside / "config.json").is_file():
            print(f"model: {inside}", file=sys.stderr)
            return inside
    others = sorted(p.parent for p in folder.glob("*/config.json"))
    hint = f"; there is one in {others[-1]}" if others else ""
    raise ValueError(f"{folder} holds no model (no config.json){hint}")
