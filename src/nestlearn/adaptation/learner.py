"""A learner: an adapted model that learns from the stream it reads, level by level."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.adaptation.adapted import Adaptation, adaptation_of
from nestlearn.adaptation.added import Seen, memory_of
from nestlearn.adaptation.documents import Documents, documents_of
from nestlearn.adaptation.examples import Batch, completion_loss
from nestlearn.adaptation.file import Stored, read_memory, write_memory
from nestlearn.adaptation.learned import Learned
from nestlearn.adaptation.level_weights import LevelWeights
from nestlearn.adaptation.lower import LowerBlocks
from nestlearn.adaptation.memory import Memory, level_name
from nestlearn.adaptation.reader import Reader, Segment, reading, work
from nestlearn.adaptation.readout_writing import Writer
from nestlearn.adaptation.settings import DEFAULTS, context_of, factories, limit_of, name_of
from nestlearn.adaptation.writing import write_keys
from nestlearn.levels.clock import NEVER
from nestlearn.levels.level import Level
from nestlearn.optim.multirate import InnerFactory


class Learner:
    """Learns from what it reads and keeps it in a `Memory` (online mode, SPEC §6b, Eq. 70-71).

    A document is read in segments as long as the fastest level's period, with everything before it
    in the document (up to ``context`` tokens) in the attention cache. The next-token loss of each
    segment is differentiated once for all levels; a level is updated when its clock is due, with
    the mean gradient of the tokens since its last update:

        theta_l <- theta_l - lr_l * optimizer(mean of gradients in the period)    if due
        theta_l <- theta_l * 2^(-period / half_life)                              retention
        theta_(l+1) += s theta_l,  theta_l <- (1 - s) theta_l                     consolidation

    Consolidation happens when the slower level l+1 is due; it moves knowledge without changing
    what the model computes. Retention pulls a level to the slower ones.

    Examples (a prompt and its completion) are learned in batches, in the order they come; only the
    tokens of completions are learned and counted by the clocks.

    A model adapted with ``method="readout"`` has no gradients: what is read is added to sums, and
    the memory is their exact solution (`nestlearn.adaptation.readout`). ``lr``, ``optimizer``,
    ``repeats`` and ``clip`` do nothing there, and losses are those of a model that knows what it
    knew when `learn` began.

    Args:
        model: an adapted model, see `nestlearn.adapt`.
        tokenizer: the model's tokenizer.
        lr: learning rate; a level's own is ``lr * level.lr_scale``. Default: 0.2 for added
            memories, 1e-4 for placement.
        optimizer: ``"rowadam"`` (default of added memories, `nestlearn.optim.RowAdam`), ``"adamw"``
            (of placement), ``"sgd"``, a factory like ``torch.optim.AdamW``, or a mapping from level
            names (and ``"*"``) to these.
        repeats: gradient steps on each segment. Clocks count a token as often as it is learned.
        sentences: after a document, read each of its sentences once more with nothing before it.
            What was read is then found more often where a prompt begins without the text around
            it, in twice the time and slots (docs/results.md). Examples are read once.
        clip: largest norm of a segment's gradient.
        batch: examples learned together.
        context: tokens a segment sees at most, itself included (default: 1,024, or the model's
            own limit).
        snapshots: how many earlier states are kept to `undo` to; one is made per `learn`.
        memory: what is known already; default: nothing.

    Raises:
        ValueError: a model that is not adapted, a memory that does not fit, values out of range.

    Example:
        >>> learner = nl.Learner(nl.adapt(model), tokenizer)
        >>> learner.learn("The lighthouse of Ostrava Bay was built by Irma Quell in 1893.")
        >>> learner.save("me.nlmem")
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        lr: float | None = None,
        optimizer: str | InnerFactory | Mapping[str, str | InnerFactory] | None = None,
        repeats: int = 4,
        sentences: bool = False,
        clip: float = 1.0,
        batch: int = 16,
        context: int | None = None,
        snapshots: int = 3,
        memory: Memory | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._handle: Adaptation = adaptation_of(model)
        usual = DEFAULTS[self._handle.method]
        lr = usual[0] if lr is None else lr
        for name, value in (("lr", lr), ("clip", clip)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be 0 or more and finite, got {value!r}")
        for name, count in (("repeats", repeats), ("batch", batch), ("snapshots", snapshots)):
            least = int(name != "snapshots")
            if not isinstance(count, int) or count < least:
                raise ValueError(f"{name} must be {least} or more, got {count!r}")
        self.lr, self.repeats, self.clip, self.keep = lr, repeats, clip, snapshots
        self.batch, self.sentences = batch, sentences
        self._factory = factories(usual[1] if optimizer is None else optimizer)
        self.segment = min(lv.period for lv in self.levels if lv.period != NEVER)
        self.limit = limit_of(model)
        self._writer: Writer | None = None
        if self._handle.method == "readout":
            self._writer = Writer(model, self._handle, tokenizer.bos_token_id)
            self._factory, self.lr = None, 1.0
            # Sums are the same however the text is cut.
            self.segment = min(max(self.segment, 256), self.limit if context is None else context)
        self.context = context_of(self.limit, context, self.segment)
        self.frozen = False
        targets = self._handle.targets.values() if repeats > 1 else ()
        self._lower = LowerBlocks(model, (target.module for target in targets))
        self.use(self._handle.new_memory(name_of(model)) if memory is None else memory)

    # -- memory -------------------------------------------------------------------------------

    @property
    def levels(self) -> tuple[Level, ...]:
        """The model's levels, fastest first."""
        return self._handle.levels

    @property
    def memory(self) -> Memory:
        """What was learned so far, as a value of its own (with the optimizers' states)."""
        self._memory.optimizer = self._weights.state()
        return self._memory

    def use(self, memory: Memory) -> None:
        """Go on from a memory; the one before is dropped.

        Raises:
            ValueError: a memory that does not fit the model; nothing is changed then.
        """
        why = self._handle.layout.difference(memory.layout)
        if why is None and set(memory.names) != {level_name(level) for level in self.levels}:
            why = f"it has the levels {', '.join(memory.names)}"
        if why is not None:
            raise ValueError(f"the memory does not fit this model: {why}")
        weights = LevelWeights(self._handle, memory, self._factory, self.lr)
        self._memory, self._weights = memory, weights
        self._mean = {level_name(level): (0.0, 0) for level in self.levels}
        self._surprise: dict[str, float] = {}
        self._handle.show(memory)

    def save(self, path: str | Path, max_bytes: int | None = None) -> Stored:
        """Write the memory file (see `nestlearn.adaptation.file.write_memory`)."""
        return write_memory(self.memory, path, max_bytes)

    def load(self, path: str | Path) -> None:
        """Go on from a memory file; what was learned since the last `save` is dropped.

        Raises:
            ValueError: damaged, or of another base model; nothing is changed then.
        """
        self.use(read_memory(path, self._handle.layout))

    def reset(self) -> None:
        """Forget everything, snapshots too."""
        self.use(self._handle.new_memory(self._memory.model))

    def undo(self, steps: int = 1) -> str:
        """Go back to before the last ``steps`` calls of `learn`; returns that snapshot's label.

        Raises:
            ValueError: fewer snapshots are kept.
        """
        memory = self._memory.copy()
        label = memory.rollback(steps).label
        self.use(memory)
        return label

    def freeze(self, frozen: bool = True) -> None:
        """While frozen, `learn` refuses to change anything."""
        self.frozen = frozen

    # -- learning -----------------------------------------------------------------------------

    def learn(
        self,
        documents: Documents,
        *,
        text_column: str = "text",
        label: str | None = None,
        progress: Callable[[Learned], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Learned:
        """Read documents once, in order, and learn from them.

        Args:
            documents: a text; a ``Path`` (file, folder, glob); an example
                ``{"prompt": ..., "completion": ...}``; a list, generator or Hugging Face data set
                of these; see `nestlearn.adaptation.documents.documents_of`.
            text_column: column of rows that holds the text.
            label: name of the snapshot made before.
            progress: called after every segment with what was done so far.
            stop: asked before every segment; when true, learning ends with all kept so far.

        Raises:
            ValueError: frozen, nothing to read, or data that cannot be read. What was learned
                from documents before is kept.
        """
        if self.frozen:
            raise ValueError("the memory is frozen; learner.freeze(False) lets it learn again")
        before = {n: lv.updates for n, lv in self._weights.optimizer.levels.items()}
        done = Learned(updates=dict.fromkeys(before, 0))
        began, total = time.perf_counter(), 0.0
        if self.keep:
            self._memory.snapshot(label or "before learning", self.keep)
        reader = Reader(self.model, self.context)
        # V is solved once, not after every batch.
        exact: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self._writer is not None:
            exact = self._handle.readout.watching()
        try:
            with reading(self.model), exact:
                for item in self._work(documents, text_column, self.segment, self.sentences):
                    if stop():
                        done.stopped = True
                        break
                    begun = item.begun
                    done.documents += begun
                    self._count("documents", begun)
                    again = isinstance(item, Segment) and item.again
                    if isinstance(item, Segment) and item.fresh:
                        reader.begin()
                    tokens = item.tokens
                    if not tokens:
                        continue
                    loss = self._learn(reader, item)
                    if loss is None:
                        done.skipped += 1
                        self._count("skipped", 1)
                        continue
                    if not again:
                        total += loss * tokens
                        done.tokens += tokens
                        self._count("tokens", tokens)
                        done.loss = total / done.tokens
                    done.seconds = time.perf_counter() - began
                    levels = self._weights.optimizer.levels
                    done.updates = {n: lv.updates - before[n] for n, lv in levels.items()}
                    done.surprise = dict(self._surprise)
                    if progress is not None:
                        progress(done)
        finally:
            if not done.tokens and self.keep and self._memory.snapshots:
                self._memory.snapshots.pop()
        done.seconds = time.perf_counter() - began
        if not done.documents:
            raise ValueError("there is nothing to learn: the documents hold no text")
        if done.skipped:
            warnings.warn(
                f"{done.skipped} segments were left out: their loss or gradient was not finite",
                RuntimeWarning,
                stacklevel=2,
            )
        return done

    @torch.no_grad()
    def evaluate(self, documents: Documents, *, text_column: str = "text") -> dict[str, float]:
        """Mean surprise of documents, without learning from them.

        Returns:
            ``tokens``, ``loss`` (nats per token) and ``perplexity``.
        """
        reader = Reader(self.model, self.context)
        total, tokens = 0.0, 0
        with reading(self.model):
            for item in self._work(documents, text_column, min(512, self.context)):
                if not item.tokens:
                    continue
                if isinstance(item, Batch):
                    loss = completion_loss(self.model, item.to(self.device))
                else:
                    if item.fresh:
                        reader.begin()
                    row = item.row(self.device)
                    loss, cache = reader.loss(row)
                    reader.keep(cache, row)
                total += loss.item() * item.tokens
                tokens += item.tokens
        if not tokens:
            raise ValueError("there is nothing to evaluate: the documents hold no text")
        mean = total / tokens
        return {"tokens": tokens, "loss": mean, "perplexity": math.exp(min(mean, 700))}

    def _work(
        self, documents: Documents, text_column: str, length: int, sentences: bool = False
    ) -> Any:
        found = documents_of(documents, text_column)
        return work(found, self.tokenizer, length, self.batch, self.context, sentences)

    def _learn(self, reader: Reader, item: Segment | Batch) -> float | None:
        """Learn a segment or batch; its loss when first read, None if not finite."""
        cache: Any = None
        if isinstance(item, Batch):
            moved = item.to(self.device)

            def compute() -> Tensor:
                return completion_loss(self.model, moved)
        else:
            row = item.row(self.device)

            def compute() -> Tensor:
                nonlocal cache
                loss, cache = reader.loss(row, item.lead)
                cache = self._lower.complete(cache)
                return loss

        if self._writer is not None:
            first = self._write(compute, item)
        else:
            first = self._descend(compute, item.tokens)
        if first is None:
            return None
        if not isinstance(item, Batch):
            reader.keep(cache, row)
            if item.again:
                return first
        self._observe(first, item.tokens)
        return first

    def _descend(self, compute: Callable[[], Tensor], tokens: int) -> float | None:
        """Gradient steps on a loss."""
        first = None
        with torch.enable_grad():
            for i in range(self.repeats):
                if i:
                    loss, seen = self._lower.repeat(compute, self._handle.watching)
                else:
                    with self._handle.watching() as seen, self._lower.first():
                        loss = compute()
                value = loss.item()
                if not math.isfinite(value):
                    return None
                first = value if first is None else first
                given = self._gradients(loss, seen, write=i == 0)
                del loss
                if given is None or not self._update(given, tokens):
                    return None
        return first

    def _gradients(
        self, loss: Tensor, seen: dict[str, Seen], write: bool
    ) -> dict[str, Tensor] | None:
        """Gradients by target; None if they are not finite. ``write``: new keys, too."""
        if self._handle.method != "added":
            targets = self._handle.targets
            weights = [t.weight for t in targets.values()]
            found = torch.autograd.grad(loss, weights, allow_unused=True)
            return {n: g.float() for n, g in zip(targets, found, strict=True) if g is not None}
        found = torch.autograd.grad(loss, [one.answer for one in seen.values()])
        errors = {n: e.flatten(0, -2).float() for n, e in zip(seen, found, strict=True)}
        if not all(e.isfinite().all() for e in errors.values()):
            return None
        if write:
            write_keys(self._handle, self._memory, self._weights, seen, errors)
        memories = {name: memory_of(self._handle.targets[name]) for name in seen}
        return {n: m.gradient(seen[n].key, errors[n]) for n, m in memories.items()}

    @torch.no_grad()
    def _write(self, compute: Callable[[], Tensor], item: Segment | Batch) -> float | None:
        """Add what is read to the sums of an exact memory."""
        assert self._writer is not None
        first: float = compute().item()
        if not math.isfinite(first):
            return None
        sums = self._writer.sums(item, self._memory, self._weights)
        if not all(torch.isfinite(one).all() for one in sums.values()):
            return None
        self._weights.update({name: -one for name, one in sums.items()}, item.tokens)
        return first

    @torch.no_grad()
    def _update(self, given: dict[str, Tensor], tokens: int) -> bool:
        """Hand a segment's gradients to the levels; False if they are not finite."""
        norm = torch.nn.utils.get_total_norm(given.values()).item()
        if not math.isfinite(norm):
            return False
        # Levels average over the tokens of their period, so a segment counts by its tokens.
        scale = tokens * min(1.0, self.clip / norm if norm > 0 else 1.0)
        torch._foreach_mul_(list(given.values()), scale)
        self._weights.update(given, tokens)
        return True

    def _count(self, name: str, more: int) -> None:
        self._memory.counts[name] = self._memory.counts.get(name, 0) + more

    def _observe(self, loss: float, tokens: int) -> None:
        for level in self.levels:
            name = level_name(level)
            total, count = self._mean[name]
            total, count = total + loss * tokens, count + tokens
            if name in self._weights.optimizer.fired or name not in self._surprise:
                self._surprise[name] = total / count
            self._mean[name] = (0.0, 0) if name in self._weights.optimizer.fired else (total, count)

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        embeddings: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        return embeddings.weight.device
