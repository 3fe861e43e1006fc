"""``nestlearn demo-train``: train a small Hope on this machine, sample from it, stream through it.

No download: the text is the standard library of the running Python. The four parts are functions
of their own, to be read as examples of the library's use.
"""

from __future__ import annotations

import codecs
import functools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from nestlearn.cli.demo_text import (
    Corpus,
    bigram_bits,
    excerpts,
    lzma_bits,
    standard_library,
    zlib_bits,
)
from nestlearn.cli.machine import resident_bytes
from nestlearn.models.hope import HopeConfig, HopeForCausalLM
from nestlearn.optim.groups import level_groups
from nestlearn.optim.multirate import MultiRate
from nestlearn.train.tokenizers import ByteTokenizer

BOS = 256
TRAINING_SHARE = 0.68  # of the time; the rest is evaluation, the sample and the stream
CHUNK = 512  # tokens read at a time while streaming
EXCERPT = 1024  # bytes of a validation excerpt; every coder starts anew with each


@dataclass
class DemoTrain:
    """Train a small Hope on Python's own sources, write a sample, stream 200,000 tokens."""

    minutes: float = 3.0
    """Roughly how long all of it may take."""
    stream_tokens: int = 200_000
    """Tokens streamed through the trained model at the end."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("nestlearn-demo")
    """Where the model is saved."""
    mixer: str = "self_modifying"
    """Sequence layer: self_modifying (Hope), attention, or a baseline such as gated_deltanet."""
    lr: float = 4e-3
    """Peak learning rate."""
    seed: int = 0

    def run(self) -> int:
        """Train, compare, sample, save, stream."""
        if not self.minutes > 0:
            raise ValueError(f"--minutes must be more than 0, got {self.minutes}")
        if self.stream_tokens < 0:
            raise ValueError(f"--stream-tokens must be 0 or more, got {self.stream_tokens}")
        console = Console()
        torch.manual_seed(self.seed)
        corpus = standard_library()
        model = HopeForCausalLM(demo_config(self.mixer))
        parameters = sum(p.numel() for p in model.parameters())
        console.rule("1. train")
        console.print(
            f"{len(corpus.training) / 1e6:.1f} MB of {corpus.training_files} files of Python's own "
            f"standard library; {len(corpus.validation) / 1e3:.0f} kB of {corpus.validation_files} "
            f"other files are kept for validation.\n{self.mixer}, {parameters / 1e6:.2f} M "
            f"parameters, {torch.get_num_threads()} CPU threads, one byte = one token."
        )
        seconds = self.minutes * 60 * TRAINING_SHARE
        steps = train(model, corpus, seconds, self.lr, self.seed, console)
        console.print(f"{steps.count} steps, {steps.tokens:,} bytes read.")

        console.rule("2. compare")
        compare(model, corpus, console)
        console.rule("3. sample")
        sample(model, "def read_", console)
        save(model, self.out)
        if self.stream_tokens:
            console.rule("4. stream")
            stream(model, corpus.training, self.stream_tokens, console)
        console.rule("next")
        console.print(
            f"The model is in {self.out}. Try\n"
            f"  nestlearn generate {self.out} --prompt 'class Node:'\n"
            "  nestlearn train --help\n"
            "  nestlearn doctor",
            highlight=False,
        )
        return 0


def demo_config(mixer: str = "self_modifying") -> HopeConfig:
    """The demo's model: bytes, three blocks, two CMS levels."""
    return HopeConfig.preset("small", mixer=mixer, num_hidden_layers=3, intermediate_size=512)


@dataclass
class Steps:
    """What a training run amounted to."""

    count: int = 0
    tokens: int = 0


def train(
    model: HopeForCausalLM,
    corpus: Corpus,
    seconds: float,
    lr: float = 4e-3,
    seed: int = 0,
    console: Console | None = None,
    batch: int = 8,
    length: int = 256,
) -> Steps:
    """Train for a given time: AdamW on every level, warm-up and cosine measured in time.

    Small batches: in two minutes many small steps get further than few large ones.
    """
    console = console or Console()
    optimizer = MultiRate(
        level_groups(model, lr), functools.partial(torch.optim.AdamW, betas=(0.9, 0.95))
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    rng = torch.Generator().manual_seed(seed)
    training = as_tokens(corpus.training)
    peek = corpus.validation[:16_384]
    looks = iter([0.1, 0.25, 0.5, 0.75])
    next_look = next(looks)
    done = Steps()
    loss_average = math.nan
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=console
    )
    with progress:
        task = progress.add_task("measuring speed", total=1.0)
        started = time.perf_counter()
        while (elapsed := (time.perf_counter() - started) / seconds) < 1 or done.count == 0:
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * schedule(elapsed)
            tokens = windows(training, batch, length, rng)
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done.count += 1
            done.tokens += tokens.numel()
            bits = loss.item() / math.log(2)
            loss_average = bits if math.isnan(loss_average) else 0.95 * loss_average + 0.05 * bits
            speed = done.tokens / (time.perf_counter() - started)
            progress.update(
                task,
                completed=min(elapsed, 1.0),
                description=f"step {done.count:4d}  {loss_average:5.2f} bits/byte  "
                f"{speed:,.0f} bytes/s",
            )
            if elapsed > next_look:
                next_look = next(looks, math.inf)
                found = bits_per_byte(model, peek)
                progress.console.print(
                    f"  after {done.tokens / 1e6:5.2f} MB: validation {found:.3f} bits per byte"
                )
                model.train()
    model.eval()
    return done


def schedule(elapsed: float, warmup: float = 0.05) -> float:
    """Fraction of the peak learning rate at ``elapsed`` in [0, 1]: linear up, cosine down to 2%."""
    if elapsed < warmup:
        return 0.05 + 0.95 * elapsed / warmup
    along = min((elapsed - warmup) / (1 - warmup), 1.0)
    return 0.02 + 0.98 * (1 + math.cos(math.pi * along)) / 2


def as_tokens(text: bytes) -> Tensor:
    """Byte tokens, ``(len(text),)`` uint8."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def windows(text: Tensor, batch: int, length: int, rng: torch.Generator) -> Tensor:
    """Random windows ``(batch, length)``, each begun with the begin-of-text token."""
    starts = torch.randint(len(text) - length + 2, (batch,), generator=rng).tolist()
    rows = torch.stack([text[s : s + length - 1] for s in starts]).long()
    return torch.cat([rows.new_full((batch, 1), BOS), rows], dim=1)


@torch.inference_mode()
def bits_per_byte(model: HopeForCausalLM, text: bytes, rows: int = 16) -> float:
    """Bits per byte of ``text``, every byte predicted once.

    The text is cut into excerpts, each read from the learned initial state, ``rows`` at a time.
    """
    model.eval()
    tokens = as_tokens(text).long()
    total = 0.0
    whole = len(tokens) // EXCERPT * EXCERPT
    batches = list(tokens[:whole].view(-1, EXCERPT).split(rows)) if whole else []
    if whole < len(tokens):
        batches.append(tokens[None, whole:])
    for targets in batches:
        begin = targets.new_full((len(targets), 1), BOS)
        logits = model(input_ids=torch.cat([begin, targets[:, :-1]], 1), use_cache=False).logits
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), reduction="sum"
        ).item()
    return total / math.log(2) / len(text)


def compare(model: HopeForCausalLM, corpus: Corpus, console: Console) -> dict[str, float]:
    """Bits per byte on the validation text beside three coders'."""
    text = corpus.validation
    pieces = excerpts(text, EXCERPT)
    with console.status("reading the validation text"):
        found = {
            "nestlearn (Hope)": bits_per_byte(model, text),
            "lzma, best level": lzma_bits(pieces),
            "zlib, level 9": zlib_bits(pieces),
            "bigram model of the training text": bigram_bits(corpus.training, pieces),
        }
    title = f"{len(text):,} bytes of files not trained on, in excerpts of {EXCERPT:,} bytes"
    table = Table("", "bits per byte", title=title)
    for name, bits in sorted(found.items(), key=lambda item: item[1]):
        table.add_row(name, f"{bits:.3f}")
    console.print(table)
    return found


@torch.inference_mode()
def sample(model: HopeForCausalLM, prompt: str, console: Console, new_tokens: int = 400) -> str:
    """Continue ``prompt``, showing the text while it is written."""
    model.eval()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = prompt
    console.print(prompt, end="", style="bold", markup=False, highlight=False)
    for token in sampled(model, [BOS, *prompt.encode()], new_tokens):
        piece = decoder.decode(bytes([token]))
        text += piece
        console.out(piece, end="", highlight=False)
    console.print()
    return text


def sampled(
    model: HopeForCausalLM, prompt: list[int], new_tokens: int, temperature: float = 0.7
) -> Iterator[int]:
    """Byte tokens drawn one by one; the model's state is all that is kept of the past."""
    out = model(input_ids=torch.tensor([prompt]), use_cache=True)
    for _ in range(new_tokens):
        chances = torch.softmax(out.logits[0, -1, :BOS].float() / temperature, dim=-1)
        token = int(torch.multinomial(chances, 1))
        yield token
        out = model(
            input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True
        )


def save(model: HopeForCausalLM, folder: Path) -> None:
    """Save model and tokenizer where ``AutoModelForCausalLM`` and ``AutoTokenizer`` find them."""
    disable_progress_bar()  # a bar for one small file would only interrupt the output
    model.save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)


@dataclass
class StreamReport:
    """One line of the streaming table."""

    position: int
    seconds_per_token: float
    state_bytes: int
    process_bytes: int


@torch.inference_mode()
def stream(
    model: HopeForCausalLM, text: bytes, total: int, console: Console, lines: int = 5
) -> list[StreamReport]:
    """Read ``total`` tokens with a state of constant size; report time and memory on the way.

    Time per token is the median over the chunks since the line before.
    """
    model.eval()
    tokens = as_tokens(text).long().repeat(-(-total // len(text)))[:total]
    marks = [round(total * (i + 1) / lines) for i in range(lines)]
    reports: list[StreamReport] = []
    times: list[float] = []
    cache, position = None, 0
    with Live(_stream_table(reports), console=console, refresh_per_second=4) as live:
        while position < total:
            chunk = tokens[None, position : position + CHUNK]
            started = time.perf_counter()
            out = model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
            times.append((time.perf_counter() - started) / chunk.shape[1])
            cache, position = out.past_key_values, position + chunk.shape[1]
            if position >= marks[len(reports)]:
                reports.append(
                    StreamReport(
                        position,
                        sorted(times)[len(times) // 2],
                        cache.nbytes,
                        resident_bytes(),
                    )
                )
                times = []
                live.update(_stream_table(reports))
    first, last = reports[0], reports[-1]
    console.print(
        f"\nFrom token {first.position:,} to {last.position:,}: time per token "
        f"× {last.seconds_per_token / first.seconds_per_token:.2f}, state "
        f"× {last.state_bytes / first.state_bytes:.2f}, process memory "
        f"{(last.process_bytes - first.process_bytes) / 2**20:+.1f} MiB.",
        highlight=False,
    )
    return reports


def _stream_table(reports: list[StreamReport]) -> Table:
    table = Table("tokens read", "time per token", "state", "process memory")
    for report in reports:
        table.add_row(
            f"{report.position:,}",
            f"{report.seconds_per_token * 1e6:.0f} µs",
            f"{report.state_bytes / 2**10:,.1f} KiB",
            f"{report.process_bytes / 2**20:,.0f} MiB",
        )
    return table
