"""A model as lm-eval sees it: what it thinks of texts, and how it continues them.

Every request starts from the model's initial state, and nothing a model keeps in memory goes from
one request to another (state policy "reset per request"). Requests that are longer than the model's
context are refused, or cut with a line that says how many.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from nestlearn.evals.reading import context_length

_GENERATED = 256  # tokens, where a task does not say how many


@register_model("nestlearn")
class Backend(TemplateLM):
    """A causal language model of transformers or of this library, for lm-eval.

    Args:
        pretrained, tokenizer: a model and its tokenizer, loaded.
        max_length: longest context in tokens; None: what the model's configuration says, or no
            limit for models with a state of constant size.
        overflow: what to do with requests that are longer: ``"error"``, or ``"cut"`` them from the
            left, as lm-eval's own backends do, with one printed line.
        batch_tokens: tokens in one forward pass, padding included.
        segment: tokens a model without a limit reads at a time, its state handed on.
        notify: gets a line about what was cut.

    Raises:
        ValueError: a value out of range.

    Example:
        >>> lm_eval.simple_evaluate(Backend(model, tokenizer), tasks=["piqa"], limit=20)
    """

    def __init__(
        self,
        pretrained: Any,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        overflow: Literal["error", "cut"] = "error",
        batch_tokens: int = 4096,
        segment: int = 4096,
        notify: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:
        super().__init__()
        for name, value in (("batch_tokens", batch_tokens), ("segment", segment)):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length must be 2 or more, got {max_length}")
        if overflow not in ("error", "cut"):
            raise ValueError(f"overflow must be error or cut, got {overflow!r}")
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer needs an end-of-text token (eos_token)")
        self.model, self.tokenizer = pretrained.eval(), tokenizer
        self.max_length = max_length or context_length(self.model)
        self.overflow, self.batch_tokens, self.segment = overflow, batch_tokens, segment
        self.notify = notify
        pad = tokenizer.pad_token_id
        self.pad = int(tokenizer.eos_token_id if pad is None else pad)
        self._device = self.model.device

    # -- text and tokens ----------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """Ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Stands before a text without context: begin of text; for models of this library, whose
        training texts follow each other, end of text."""
        begin = self.tokenizer.bos_token_id
        if begin is None or self.model.config.model_type == "hope":
            return self.eot_token_id
        return int(begin)

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's caches."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token numbers; special tokens where the tokenizer adds them unless told otherwise."""
        special = True if add_special_tokens is None else add_special_tokens
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=special, verbose=False)
        return ids

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """Log-likelihoods of continuations of contexts, and whether they are greedy ones."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    # -- likelihoods --------------------------------------------------------------------------

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts.

        A text longer than the model's context is read in windows that start anew; every token is
        predicted once. Models without a limit read any text in one go.
        """
        windows, owners = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            size = self.max_length or len(ids)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, size, 1):
                windows.append((("", text), *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        found = self._loglikelihood_tokens(windows)
        for owner, (value, _) in zip(owners, found, strict=True):
            totals[owner] += value
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Of ``(text, context, continuation)`` in tokens: log-likelihood of the continuation, and
        whether greedy decoding would say it."""
        owners, fitted = self._fit([(c, a) for _, c, a in requests])
        # Requests whose inputs are equal (answers of one token to one question) are read once.
        same: dict[tuple[int, ...], list[int]] = {}
        for number, (context, answer) in enumerate(fitted):
            same.setdefault(tuple(context + answer[:-1]), []).append(number)
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        # An answer in pieces: log-likelihoods add up, and all must be what greedy decoding says.
        for rows in self._batches(list(same)):
            first = min(len(fitted[i][0]) for row in rows for i in same[row]) - 1
            for row, logs in zip(rows, self._log_probabilities(rows, first), strict=True):
                for i in same[row]:
                    context, answer = fitted[i]
                    start = len(context) - 1 - first
                    part = logs[start : start + len(answer)]
                    right = torch.tensor(answer, device=part.device)
                    value = float(part.gather(1, right[:, None]).double().sum())
                    total, greedy = found[owners[i]]
                    said = bool((part.argmax(-1) == right).all())
                    found[owners[i]] = total + value, greedy and said
        return found

    def _fit(
        self, pairs: list[tuple[list[int], list[int]]]
    ) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
        """Contexts cut so that what is read fits, if that is allowed; an answer that is longer than
        the model's context in pieces, each after as much as fits of what is before it. First the
        number of the pair that each belongs to."""
        limit = self.max_length
        if limit is None:
            return list(range(len(pairs))), pairs
        self._say_overflow([len(context) + len(answer) - 1 for context, answer in pairs], limit)
        owners, fitted = [], []
        for number, (context, answer) in enumerate(pairs):
            for start in range(0, len(answer), limit):
                piece, before = answer[start : start + limit], context + answer[:start]
                owners.append(number)
                fitted.append((before[max(0, len(before) + len(piece) - 1 - limit) :], piece))
        return owners, fitted

    def _say_overflow(self, lengths: list[int], limit: int) -> None:
        over = [n for n in lengths if n > limit]
        if not over:
            return
        what = (
            f"{len(over)} of {len(lengths)} requests are longer than the model's context of "
            f"{limit} tokens (the longest has {max(over)})"
        )
        if self.overflow == "error":
            raise ValueError(f"{what}; allow --overflow cut, or a larger --max-length")
        self.notify(f"{what}: cut from the left")

    def _batches(self, rows: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Rows of similar lengths, the longest first, so that memory runs out at once or never."""
        batch: list[tuple[int, ...]] = []
        for row in sorted(rows, key=len, reverse=True):
            if batch and len(batch[0]) * (len(batch) + 1) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    @torch.inference_mode()
    def _log_probabilities(self, rows: Sequence[tuple[int, ...]], first: int) -> list[Tensor]:
        """Per row ``(tokens, V)``: of the next token, at every position from ``first`` on."""
        ids, mask = self._padded(rows, left=False)
        if self.max_length is None and len(rows) == 1 and ids.shape[1] > self.segment:
            return [self._streamed(ids, first)]
        keep = ids.shape[1] - first
        logits = self.model(
            input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep
        ).logits
        return list(logits.float().log_softmax(-1))

    def _streamed(self, ids: Tensor, first: int) -> Tensor:
        """The same of one long row, read in segments with the state handed on."""
        state, parts = None, []
        for start in range(0, ids.shape[1], self.segment):
            part = ids[:, start : start + self.segment]
            out = self.model(input_ids=part, past_key_values=state, use_cache=True)
            state = out.past_key_values
            parts.append(out.logits[0, max(0, first - start) :].float().log_softmax(-1))
        return torch.cat(parts)

    def _padded(self, rows: Sequence[Sequence[int]], left: bool) -> tuple[Tensor, Tensor]:
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.pad)
        mask = torch.zeros_like(ids)
        for r, row in enumerate(rows):
            place = slice(length - len(row), length) if left else slice(0, len(row))
            ids[r, place] = torch.tensor(row, dtype=ids.dtype)
            mask[r, place] = 1
        return ids.to(self._device), mask.to(self._device)

    # -- generation ---------------------------------------------------------------------------

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continuations, greedy unless the task samples, up to the task's stop sequences."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        found = [""] * len(requests)
        for numbers in groups.values():
            texts = [requests[i].args[0] for i in numbers]
            for i, text in zip(numbers, self._continue(texts, requests[numbers[0]].args[1]),
                               strict=True):  # fmt: skip
                found[i] = text
        return found

    def _continue(self, texts: list[str], settings: dict[str, Any]) -> list[str]:
        settings = dict(settings)
        until = settings.pop("until", None) or []
        stops = [until] if isinstance(until, str) else list(until)
        count = int(settings.pop("max_gen_toks", None) or _GENERATED)
        sampling = bool(settings.pop("do_sample", False))
        if not sampling:
            for name in ("temperature", "top_p", "top_k"):
                settings.pop(name, None)
        prompts = [self.tok_encode(text) or [self.prefix_token_id] for text in texts]
        if self.max_length is not None:
            room = self.max_length - count
            if room < 1:
                raise ValueError(
                    f"{count} tokens are to be generated, but the model's context is "
                    f"{self.max_length}; set a larger --max-length"
                )
            self._say_overflow([len(ids) + count for ids in prompts], self.max_length)
            prompts = [ids[-room:] for ids in prompts]
        places: dict[tuple[int, ...], list[int]] = {}
        for i, ids in enumerate(prompts):
            places.setdefault(tuple(ids), []).append(i)
        found = [""] * len(texts)
        for batch in self._batches(list(places)):
            for row, text in zip(
                batch, self._generate(batch, stops, count, sampling, settings), strict=True
            ):
                for i in places[row]:
                    found[i] = text
        return found

    @torch.inference_mode()
    def _generate(
        self,
        rows: Sequence[Sequence[int]],
        stops: list[str],
        count: int,
        sampling: bool,
        settings: dict[str, Any],
    ) -> list[str]:
        from transformers import StoppingCriteriaList

        ids, mask = self._padded(rows, left=True)
        length = ids.shape[1]

        def stopped(sequences: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            texts = self.tokenizer.batch_decode(sequences[:, length:], skip_special_tokens=True)
            return torch.tensor([any(s in t for s in stops) for t in texts], device=ids.device)

        out = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=count,
            do_sample=sampling,
            pad_token_id=self.pad,
            stopping_criteria=StoppingCriteriaList([stopped] if stops else []),
            **settings,
        )
        texts = self.tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
        return [_before(text, stops) for text in texts]


def _before(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text
