"""Tables and figures that a script under ``benchmarks/`` measures.

Such a script has a result file of its own, to which it adds cell by cell. The experiment runs it
and reads that file; where nothing was measured yet, the results committed in ``benchmarks/results``
are shown instead, and said to be that.
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nestlearn.evals.harness.experiment import Experiment, Request, Scale, Table
from nestlearn.evals.harness.results import ROOT, Results, machine, read

Columns = tuple[str, ...]
Rows = tuple[tuple[Any, ...], ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """One run of a script.

    Attributes:
        committed: name of the result file in ``benchmarks/results``, without ``.json``.
        flags: scale -> flags of the script; scales that are missing do not have this part.
    """

    committed: str
    flags: Mapping[Scale, tuple[str, ...]]


class Scripted(Experiment):
    """Runs a script of the repository, and shows its results beside what the paper says.

    Attributes:
        script: its name, without ``.py``.
        parts: name -> one run of it; ``--tasks`` chooses among them.
        claim: what the paper says.
        selector: flag of the script that chooses systems, None if it has none.
        has_seeds: whether the script has the flag ``--seeds``.
    """

    script: str
    parts: Mapping[str, Part]
    claim: str
    selector: str | None = None
    has_seeds: bool = True

    def settings(self) -> dict[str, Any]:
        """The script; what its cells mean is in its own file."""
        return {"script": f"benchmarks/{self.script}.py"}

    def due(self, results: Results, request: Request) -> dict[str, dict[str, Any]]:
        """A run of every part with these flags.

        Raises:
            ValueError: outside a checkout, or a choice that the script does not have.
        """
        path = ROOT / "benchmarks" / f"{self.script}.py"
        if not path.is_file():
            raise ValueError(
                f"{self.name} is measured by benchmarks/{self.script}.py, which is not in the "
                "package: run it in a checkout of the repository, with an editable install"
            )
        known = [name for name, part in self.parts.items() if self.scale in part.flags]
        cells = {}
        for name in request.pick("tasks", known):
            flags = [*self.parts[name].flags[self.scale]]
            if request.systems is not None:
                if self.selector is None:
                    raise ValueError(f"--systems: {self.name} has no systems to choose from")
                flags += [self.selector, *request.systems]
            if request.seeds is not None:
                if not self.has_seeds:
                    raise ValueError(f"--seeds: {self.name} has no seeds")
                flags += ["--seeds", str(request.seeds)]
            cell = f"{name}: {self.script}.py {' '.join(flags)}".rstrip()
            if results.get(cell) is None:
                flags += ["--fresh"] if request.fresh else []
                cells[cell] = {"flags": flags, "out": str(self.file(results, name))}
        return cells

    def measure(self, cell: dict[str, Any]) -> dict[str, Any]:
        """Run the script; it goes on where its result file stands.

        Raises:
            RuntimeError: it failed. What it said is on the terminal.
        """
        import torch

        script = ROOT / "benchmarks" / f"{self.script}.py"
        given = [*cell["flags"], "--out", cell["out"], "--threads", str(torch.get_num_threads())]
        if self.needs_model:
            given += ["--model", cell["model"]]
        # Its tables are ours, too; what it says on the way is for the terminal.
        done = subprocess.run([sys.executable, str(script), *given], stdout=subprocess.DEVNULL)
        if done.returncode:
            raise RuntimeError(f"{script.name} ended with status {done.returncode}; see above")
        return {
            "flags": cell["flags"],
            "out": Path(cell["out"]).name,
            "rows": len(read(cell["out"])["rows"]),
        }

    def summary(self, row: dict[str, Any]) -> str:
        """How much is in the script's file."""
        return f"{row['rows']} rows in {row['out']}"

    def file(self, results: Results, part: str) -> Path:
        """Result file that the script writes for a part."""
        return results.path.with_name(f"{results.path.stem}.{part}.json")

    def found(self, results: Results, part: str) -> tuple[Path, bool] | None:
        """(the part's result file, whether it is the one committed); None if there is neither."""
        own = self.file(results, part)
        committed = ROOT / "benchmarks" / "results" / f"{self.parts[part].committed}.json"
        for path, is_committed in ((own, False), (committed, True)):
            if path.is_file():
                return path, is_committed
        return None

    def tables(self, results: Results) -> list[Table]:
        """A table of every part's file, with the paper's claim and how it was measured."""
        tables = []
        for name in self.parts:
            if (place := self.found(results, name)) is None:
                continue
            path, committed = place
            record = read(path)
            columns, rows = self.read(record)
            origin = "benchmarks/results" if committed else "this machine"
            note = (
                f"{self.claim} Measured ({origin}) with `{record['command']}`, commit "
                f"{record['commit']}, {record['date']}, {machine(record['hardware'])}."
            )
            title = name if not committed else f"{name}, committed result"
            tables.append(Table(title, columns, rows, note))
        return tables

    def read(self, record: dict[str, Any]) -> tuple[Columns, Rows]:
        """Table of a result file of the script."""
        raise NotImplementedError

    def plot(self, results: Results, path: Path) -> bool:
        """The script's own picture, of the first part that has one."""
        for name in self.parts:
            place = self.found(results, name)
            if place is not None and place[0].with_suffix(".png").is_file():
                shutil.copyfile(place[0].with_suffix(".png"), path)
                return True
        return False


def _summary(record: dict[str, Any], first: str, columns: Mapping[str, str]) -> tuple:
    """A table of a file's summary: head -> entry."""
    rows = [
        (name, *(found.get(key) for key in columns.values()))
        for name, found in record["summary"].items()
    ]
    return (first, *columns), tuple(rows)


class ClassIncremental(Scripted):
    """Classes that come in tasks."""

    name = "fig6"
    item = "Figure 6"
    title = "class-incremental classification"
    question = "How well are classes told apart that come in tasks, and what is forgotten?"
    needs_model = True
    script = "class_incremental"
    selector = "--methods"
    claim = (
        "The paper: Hope (a pre-trained model with levels) is above in-context learning, EWC and "
        "InCA on CLINC150, Banking77 and DBpedia (its numbers are not at hand)."
    )
    parts = {
        "clinc150": Part(
            "class_incremental_clinc150",
            {
                "tiny": ("--scale", "cpu", "--skip-tuning", "--seeds", "1", "--methods", "inca",
                         "nestlearn", "naive", "joint"),
                "small": ("--data", "clinc150", "--scale", "cpu"),
                "paper": ("--data", "clinc150", "--scale", "full"),
            },
        ),
        "dbpedia14": Part(
            "class_incremental_dbpedia14",
            {
                "small": ("--data", "dbpedia14", "--scale", "cpu"),
                "paper": ("--data", "dbpedia14", "--scale", "full"),
            },
        ),
    }  # fmt: skip

    def read(self, record: dict[str, Any]) -> tuple[Columns, Rows]:
        """Accuracy, and forgetting in both definitions."""
        return _summary(record, "method", {
            "accuracy": "average_accuracy", "sd": "average_accuracy_sd",
            "incremental": "average_incremental_accuracy",
            "forgetting (best)": "forgetting_from_best",
            "forgetting (since learned)": "forgetting_since_learned",
            "backward transfer": "backward_transfer", "seeds": "seeds",
        })  # fmt: skip


class Knowledge(Scripted):
    """Passages read once."""

    name = "knowledge"
    item = "Knowledge incorporation"
    title = "passages read once, asked with the book closed"
    question = "How much of passages read once is recalled, and what does it cost elsewhere?"
    needs_model = True
    script = "knowledge"
    selector = "--methods"
    claim = "The paper has no such table."
    parts = {
        "squad": Part(
            "knowledge",
            {
                "tiny": ("--passages", "20", "--seeds", "1", "--rules", "recall", "--methods",
                         "nestlearn", "naive", "lora"),
                "small": ("--passages", "100", "--jobs", "1"),
            },
        )
    }  # fmt: skip
    scales = ("tiny", "small")

    def read(self, record: dict[str, Any]) -> tuple[Columns, Rows]:
        """Recall, damage and forgetting."""
        return _summary(record, "method, rule", {
            "cloze": "cloze_accuracy", "log-prob": "cloze_log_prob",
            "questions": "questions_accuracy", "perplexity of unrelated text":
            "perplexity_unrelated", "forgotten, nats": "forgotten_nats", "seeds": "seeds",
        })  # fmt: skip


class Landscape(Scripted):
    """Delta momentum on a winding valley."""

    name = "fig4"
    item = "Figure 4"
    title = "delta momentum on a curved landscape"
    question = "Does delta momentum reach the minimum of psi in fewer steps than momentum?"
    script = "optimizers_toy"
    has_seeds = False
    claim = "The paper: delta momentum reaches the minimum in fewer steps than momentum."
    parts = {"steps": Part("optimizers_toy", {"tiny": ()})}
    scales = ("tiny",)

    def read(self, record: dict[str, Any]) -> tuple[Columns, Rows]:
        """Steps to the minimum per landscape. "plain": momentum 0.9 and the best rate; "tuned":
        everything on a grid."""
        found = record["summary"]
        lands = tuple(dict.fromkeys(name.split("/")[0] for name in found))
        rows = []
        for kind in ("plain", "tuned"):
            names = dict.fromkeys(n for k, v in found.items() if k.endswith(kind) for n in v)
            rows += [
                (f"{name}, {kind}", *(found.get(f"{land}/{kind}", {}).get(name) for land in lands))
                for name in names
            ]
        return ("steps to the minimum", *lands), tuple(rows)


class OrthogonalTasks(Scripted):
    """What optimizers forget."""

    name = "section4.3"
    item = "Section 4.3"
    title = "what each optimizer forgets"
    question = "What is forgotten under each optimizer while orthogonal tasks are learned?"
    script = "optimizers_continual"
    claim = (
        "The paper: plain momentum forgets gradients of tasks that lie in orthogonal directions; a "
        "delta rule manages its capacity better (no numbers are at hand)."
    )
    parts = {"digits": Part("optimizers_continual", {"tiny": ()})}
    scales = ("tiny",)

    def read(self, record: dict[str, Any]) -> tuple[Columns, Rows]:
        """Accuracy when learned and at the end."""
        return _summary(record, "network/optimizer", {
            "learned": "learned", "at the end": "final", "forgotten": "forgetting",
            "rate": "lr", "trials": "trials",
        })  # fmt: skip


class EqualSteps(Scripted):
    """Losses of optimizers."""

    name = "fig11"
    item = "Figure 11"
    title = "loss of M3, AdamW, Muon and AdaMuon after equal steps"
    question = "Which optimizer has the least loss after equal steps?"
    script = "optimizers_loss"
    selector = "--optimizers"
    claim = "The paper: M3 has the least training and test loss of a vision Transformer."
    parts = {"losses": Part("optimizers_loss", {"tiny": ()})}
    scales = ("tiny",)

    def read(self, record: dict[str, Any]) -> tuple[Columns, Rows]:
        """Training and test loss."""
        return _summary(record, "task/optimizer", {
            "training loss": "train_loss", "test loss": "test_loss",
            "test accuracy": "test_accuracy", "rate": "lr", "trials": "trials",
        })  # fmt: skip


class StepTime(Scripted):
    """Times of optimizers."""

    name = "fig12"
    item = "Figure 12"
    title = "time of an optimizer step"
    question = "How long is an optimizer step on 12.6 M parameters of matrices?"
    script = "optimizers_speed"
    has_seeds = False
    claim = "The paper compares M3, AdamW, Muon and AdaMuon (its numbers are not at hand)."
    parts = {"times": Part("optimizers_speed", {"tiny": ("--blocks", "2")})}
    scales = ("tiny",)

    def read(self, record: dict[str, Any]) -> tuple[Columns, Rows]:
        """CPU time, state, and the ratio to a reference in the same run."""
        columns = {
            "CPU ms": "cpu_ms", "state, bytes/parameter": "state_bytes_per_parameter",
            "ratio": "ratio", "to": "reference",
        }  # fmt: skip
        rows = [
            (row["cell"], *(row.get(key) for key in columns.values())) for row in record["rows"]
        ]
        return ("optimizer", *columns), tuple(rows)
