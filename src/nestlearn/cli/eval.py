"""``nestlearn eval``: any model on standard tasks, through lm-eval, and on texts of any length."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from nestlearn.cli.pretrained import Dtype


@dataclass
class Eval:
    """Measure a model on standard tasks: language modelling, common sense, recall, long texts.

    Every request starts from the model's initial state. Prompts and metrics are lm-eval's; data
    sets come from local files where there are any, else from the Hugging Face hub. Tasks at a
    length (niah_single_1@4k, babilong_qa1@64k, qasper@8k, context@16k) are ours: needles, BABILong,
    documents, perplexity by position. Results are kept per task: a run that was cut off goes on
    with the tasks that are missing.
    """

    model: Annotated[str, tyro.conf.Positional]
    """Folder of a saved model or of a run of `nestlearn train`, a .gguf file, or a hub id."""
    memory: Path | None = None
    """A memory file of this model: what it was taught takes part (the file is only read)."""
    tasks: tuple[str, ...] = ("table2",)
    """Tasks of lm-eval; table2, table3: the paper's; squad: recall on local data; NAME@TOKENS: a
    task at a length."""
    limit: int | None = None
    """Examples of a task (default: all)."""
    shots: int | None = None
    """Examples in the prompt (default: the task's own number)."""
    text: Path | None = None
    """Folder of .txt files in which tasks at a length hide what they ask (default: the novels of
    the data sets)."""
    source: Literal["auto", "local", "hub"] = "auto"
    """Where data sets are taken from; auto: local files where there are any."""
    data: Path | None = None
    """Folder of the local data sets (default: NESTLEARN_DATA)."""
    max_length: int | None = None
    """Longest context in tokens (default: the model's; none for a state of constant size)."""
    overflow: Literal["error", "cut"] = "error"
    """Requests that are longer: refuse, or cut from the left and say so."""
    batch_tokens: int = 4096
    """Tokens in one forward pass."""
    dtype: Dtype = "auto"
    """Arithmetic and weights: auto, fp32, bf16."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    out: Path | None = None
    """Result file (default: evaluations/MODEL.json)."""
    fresh: bool = False
    """Drop earlier results."""

    def run(self) -> int:
        """Measure and print; returns the exit status."""
        from nestlearn.adaptation import adapt_to, adaptation_of
        from nestlearn.evals.harness.results import Results

        for name in ("limit", "batch_tokens", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
        if self.data is not None:
            if not self.data.is_dir():
                raise ValueError(f"--data: no folder {self.data}")
            os.environ["NESTLEARN_DATA"] = str(self.data.resolve())
        memory = self._memory()
        names = self._checked()  # what is missing: before the model is loaded
        results = Results(
            self._path(), f"How well does {self.model} do on standard tasks?", self._settings(),
            fresh=self.fresh,
        )  # fmt: skip
        due = [name for name in names if not results.done(name)]
        if due:
            model, tokenizer = load_any(self.model, self.dtype, self.device)
            if memory is not None:
                adaptation_of(adapt_to(model, memory)).show(memory)
            for task, row in self._measured(model, tokenizer, due):
                results.add(task, row)
                print(f"{task}: {_said(row)}", file=sys.stderr, flush=True)
        self._show(results)
        print(f"written: {results.path}")
        return 0

    def _checked(self) -> list[str]:
        """Names of all tasks; those of lm-eval need it, all need their data."""
        from nestlearn.evals.by_length import check_data, parse

        if self.text is not None and not self.text.is_dir():
            raise ValueError(f"--text: no folder {self.text}")
        names = []
        for given in self.tasks:
            sized = parse(given)
            if sized is not None:
                check_data(sized, self.text)
                names.append(str(sized))
                continue
            from nestlearn.evals.lm.measure import check_installed
            from nestlearn.evals.lm.tasks import expand, where

            check_installed()
            for name in expand((given,)):
                where(name, self.source)
                names.append(name)
        return [*dict.fromkeys(names)]

    def _measured(
        self, model: Any, tokenizer: Any, names: list[str]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Rows, as soon as they are there: of lm-eval's tasks first."""
        from nestlearn.evals.by_length import measure, parse

        own = {name: sized for name in names if (sized := parse(name)) is not None}
        shared: dict[str, Any] = {
            "limit": self.limit, "shots": self.shots, "overflow": self.overflow,
            "batch_tokens": self.batch_tokens,
        }  # fmt: skip
        theirs = [name for name in names if name not in own]
        if theirs:
            from nestlearn.evals.lm.measure import measure_tasks

            yield from measure_tasks(
                model, tokenizer, theirs, source=self.source, max_length=self.max_length, **shared
            )
        if own:
            from nestlearn.evals.reading import context_length

            length = self.max_length or context_length(model)
            for name, sized in own.items():
                yield name, measure(
                    model, tokenizer, sized, text=self.text, max_length=length,
                    notify=lambda line: print(line, file=sys.stderr, flush=True), **shared,
                )  # fmt: skip

    def _memory(self) -> Any:
        """The memory, checked before anything else takes time."""
        from nestlearn.adaptation import read_memory

        if self.memory is None:
            return None
        if not self.memory.is_file():
            raise ValueError(f"--memory: no file {self.memory}")
        return read_memory(self.memory)

    def _settings(self) -> dict[str, Any]:
        import hashlib
        from importlib.metadata import PackageNotFoundError, version

        from nestlearn.evals.lm.tasks import STATE_POLICY

        try:
            lm_eval = version("lm_eval")
        except PackageNotFoundError:
            lm_eval = None
        own = {} if self.text is None else {"text": str(self.text)}
        if self.memory is not None:
            content = hashlib.sha256(self.memory.read_bytes()).hexdigest()[:16]
            own["memory"] = f"{self.memory.name} ({content})"
        return own | {
            "model": self.model, "limit": self.limit, "shots": self.shots, "dtype": self.dtype,
            "source": self.source, "max_length": self.max_length, "overflow": self.overflow,
            "state": STATE_POLICY, "lm_eval": lm_eval,
        }  # fmt: skip

    def _path(self) -> Path:
        name = self.model if self.memory is None else f"{self.model}-{self.memory.stem}"
        plain = re.sub(r"[^\w.-]+", "-", name).strip("-.")
        return self.out or Path("evaluations") / f"{plain}.json"

    def _show(self, results: Any) -> None:
        from nestlearn.evals.harness.results import table
        from nestlearn.evals.lm.measure import main_metric

        rows = []
        for row in results.record["rows"]:
            metric, value, error = main_metric(row)
            rest = ", ".join(f"{k} {v:.4g}" for k, v in row["metrics"].items() if k != metric)
            rows.append((row["task"], metric, round(value, 2), error and round(error, 2),
                         rest, row["examples"], row["source"]))  # fmt: skip
        columns = ("task", "metric", "value", "± s.e.", "other metrics", "examples", "data")
        table(f"{self.model} (state: {self._settings()['state']})", columns, rows)
        for row in results.record["rows"]:
            if row.get("note"):
                print(f"{row['task']}: {row['note']}")


def _said(row: dict[str, Any]) -> str:
    from nestlearn.evals.lm.measure import main_metric

    metric, value, _ = main_metric(row)
    return f"{metric} {value:.2f} ({row['examples']} examples, {row['seconds']:.0f} s)"


def load_any(name: str, dtype: Dtype = "auto", device: str = "auto") -> tuple[Any, Any]:
    """Model (in evaluation mode) and tokenizer of a saved folder, the folder of a run of
    ``nestlearn train`` (its final, best or newest model), a GGUF file or a hub id.

    Raises:
        ValueError: nothing there, or no causal language model with a tokenizer.
    """
    import nestlearn.models.hope  # noqa: F401  (registers the architecture)
    from nestlearn.cli.generate import model_folder
    from nestlearn.cli.pretrained import load_pretrained

    path = Path(name).expanduser()
    return load_pretrained(str(model_folder(path)) if path.is_dir() else name, dtype, device)
