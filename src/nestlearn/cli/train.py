"""``nestlearn train``: a Hope (or a baseline) from text, in one command."""

from __future__ import annotations

import ast
import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nestlearn.models.hope import HopeConfig
    from nestlearn.train import Progress, TrainConfig

# What goes with a size unless a flag says otherwise: (sequence length, batch size, learning rate).
_DIAL = {
    "tiny": (128, 16, 4e-3),
    "small": (256, 16, 3e-3),
    "140m": (1024, 32, 1e-3),
    "760m": (2048, 128, 6e-4),
    "1.3b": (2048, 256, 4e-4),
}
_BPE_SAMPLE = 50_000_000  # characters a new BPE is trained on, at most
INTERRUPTED = 130

Append = tyro.conf.UseAppendAction


@dataclass
class Train:
    """Train a model on text; run the same command again to continue where it stopped."""

    data: tuple[str, ...]
    """Files, folders, globs (text, JSON lines, Parquet) or Hugging Face data sets
    (`org/name[:subset][@split]`, read as a stream)."""
    out: str | None = None
    """Folder for checkpoints, log and model (default: runs/PRESET-MIXER)."""
    preset: str = "small"
    """Size: tiny, small, 140m, 760m, 1.3b. Decides sequence length, batch and learning rate too."""
    mixer: str = "self_modifying"
    """Sequence layer: self_modifying (Hope), attention, or a baseline: linear_attention, retnet,
    deltanet, gated_deltanet, comba, rwkv7, mamba2, samba, lstm, srwm, ttt_linear, ttt_mlp, dla,
    atlas, moneta, yaad, memora, titans, titans_mac, titans_mag, titans_mal. Several, with commas
    between them: the layers take turns."""
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int | None = None
    """Sequences per step, over all processes."""
    seq_len: int | None = None
    """Tokens per sequence."""
    lr: float | None = None
    """Peak learning rate."""
    accumulate: int = 1
    """Split each process's batch into so many parts, to save memory."""
    tokenizer: str = "byte"
    """byte, bpe:N (trained on the data) or the folder or hub id of a Hugging Face tokenizer."""
    set: Annotated[tuple[str, ...], Append] = ()
    """Any field of the model's configuration, as key=value; may be repeated."""
    text_column: str | None = None
    """Column that holds the text (default: text)."""
    val_data: tuple[str, ...] = ()
    """Held-out data (default: 5% of the data, in regions that are never trained on)."""
    max_tokens: int | None = None
    """Read at most so many tokens of the data."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic; weights stay fp32."""
    compile: bool = False
    """Use torch.compile (slow start, then faster)."""
    device: str = "auto"
    """auto, cpu, cuda."""
    seed: int = 0
    """Of initial weights and order of the data."""
    eval_every: int | None = None
    """Steps between evaluations (default: ten per run)."""
    save_every: int | None = None
    """Steps between checkpoints (default: ten per run)."""
    resume: str = "auto"
    """auto continues from the last checkpoint in OUT, never refuses to, PATH continues from one."""
    log: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Further logs beside OUT/log.jsonl."""
    option: Annotated[tuple[str, ...], Append] = ()
    """Rarer settings of the run (fields of TrainConfig: warmup, clip, weight_decay, eval_sequences,
    keep, log_every, nonfinite, ...), as key=value; may be repeated."""

    def run(self) -> int:
        """Train; returns the exit status: 0, or 130 if interrupted (after saving)."""
        config = self._config()
        mixer = self.mixer.split(",") if "," in self.mixer else self.mixer
        settings = {"mixer": mixer, **_pairs("--set", self.set)}

        import transformers

        from nestlearn.train import Blocks, Distributed, Progress, Trainer, prepare

        transformers.logging.set_verbosity_error()
        processes = Distributed.start(config.device)
        progress = Progress(visible=processes.main)
        try:
            self._check_model(settings)
            with processes.main_first():
                notify = progress.line
                tokenizer = self._tokenizer(config, notify)
                read = functools.partial(
                    prepare, tokenizer=tokenizer, text_column=self.text_column, notify=notify
                )
                corpus = read(self.data, max_tokens=self.max_tokens)
                held_out = read(self.val_data) if self.val_data else None
            blocks = Blocks(corpus, config.seq_len, seed=config.seed, held_out=held_out)
            model = self._model(settings, tokenizer, config)
            self._describe(model, blocks, progress)
            trainer = Trainer(model, blocks, config, tokenizer, None, processes, progress)
            result = trainer.fit()
        finally:
            processes.close()
        return INTERRUPTED if result.interrupted else 0

    # -- settings -----------------------------------------------------------------------------

    def _config(self) -> TrainConfig:
        from nestlearn.train.config import TrainConfig

        seq_len, batch_size, lr = _DIAL.get(self.preset, _DIAL["small"])
        names = {f.name for f in dataclasses.fields(TrainConfig)}
        same = names & {f.name for f in dataclasses.fields(self)}
        values: dict[str, Any] = {name: getattr(self, name) for name in same}
        values["out"] = self.out or f"runs/{self.preset}-{self.mixer}"
        values["seq_len"] = self.seq_len if self.seq_len is not None else seq_len
        values["batch_size"] = self.batch_size if self.batch_size is not None else batch_size
        values["lr"] = self.lr if self.lr is not None else lr
        for key, value in _pairs("--option", self.option).items():
            if key not in names:
                raise ValueError(f"--option {key}: no such setting; {_near(key, names)}")
            values[key] = value
        return TrainConfig(**values)

    def _check_model(self, settings: dict[str, Any]) -> None:
        """Refuse bad presets and keys before hours of tokenising."""
        from nestlearn.models.hope import HopeConfig

        HopeConfig.preset(self.preset, **settings)

    def _tokenizer(self, config: TrainConfig, notify: Any) -> PreTrainedTokenizerBase:
        """The run's own tokenizer if it is being continued, else the one asked for."""
        from nestlearn.train import find_sources, load_tokenizer, read_documents
        from nestlearn.train.checkpoint import find_checkpoint

        texts: Any = ()
        if self.tokenizer.startswith("bpe:"):
            before = find_checkpoint(Path(config.out) / "checkpoints", config.resume)
            if before is not None:
                return load_tokenizer(str(before))
            notify(f"training a tokenizer ({self.tokenizer}) on the data")
            sources = find_sources(self.data, lambda line: None)
            texts = _sample(text for text, _ in read_documents(sources, self.text_column))
        tokenizer = load_tokenizer(self.tokenizer, texts)
        if texts and len(tokenizer) < int(self.tokenizer.removeprefix("bpe:")):
            notify(f"the data gives only {len(tokenizer)} tokens for {self.tokenizer}")
        return tokenizer

    def _model(
        self, settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase, config: TrainConfig
    ) -> Any:
        import torch

        from nestlearn.models.hope import HopeConfig, HopeForCausalLM

        given: dict[str, Any] = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        asked = settings.get("vocab_size", len(tokenizer))
        if isinstance(asked, int) and asked < len(tokenizer):
            raise ValueError(f"vocab_size {asked} is smaller than the tokenizer's {len(tokenizer)}")
        hope: HopeConfig = HopeConfig.preset(self.preset, **{**given, **settings})
        unbounded = "attention" in hope.layer_mixers and hope.sliding_window is None
        if unbounded and config.seq_len > hope.max_position_embeddings:
            raise ValueError(
                f"seq_len {config.seq_len} exceeds max_position_embeddings="
                f"{hope.max_position_embeddings}; set it with --set max_position_embeddings=N"
            )
        torch.manual_seed(config.seed)
        return HopeForCausalLM(hope)

    def _describe(self, model: Any, blocks: Any, progress: Progress) -> None:
        count = sum(p.numel() for p in model.parameters())
        tokens = len(blocks.corpus.tokens)
        progress.line(
            f"{self.preset} model, mixer {self.mixer}: {count:,} parameters; "
            f"{tokens:,} tokens of data, {len(blocks.train_starts):,} training and "
            f"{len(blocks.val_starts):,} held-out sequences of {blocks.seq_len}"
        )


def _sample(texts: Any) -> Any:
    left = _BPE_SAMPLE
    for text in texts:
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def _pairs(flag: str, items: tuple[str, ...]) -> dict[str, Any]:
    pairs = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"{flag} {item}: write key=value, as in --set cms_periods=[1,4]")
        pairs[key.strip()] = _value(text)
    return pairs


def _value(text: str) -> Any:
    """A Python value, or the text itself: 3, 1e-3, true, none, [1,4], gelu."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.strip().lower() in words:
        return words[text.strip().lower()]
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text.strip()


def _near(key: str, names: set[str]) -> str:
    import difflib

    near = difflib.get_close_matches(key, names, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(names))}"
