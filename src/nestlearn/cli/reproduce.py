"""``nestlearn reproduce``: the paper's tables and figures, ours beside the paper's."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass
class Reproduce:
    """Reproduce tables and figures of the paper.

    Results are kept per cell: a run that was cut off goes on where it stood. Every item gets a
    result file (.json), a plot (.png) and a report (.md, .html) in the output folder.
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """What to reproduce (see --list); "all" for everything."""
    list: bool = False
    """List what can be reproduced."""
    scale: Literal["tiny", "small", "paper"] = "tiny"
    """tiny: minutes to an hour on two CPU cores; small: under an hour on one GPU; paper: theirs."""
    systems: tuple[str, ...] | None = None
    """Only these systems (see --list)."""
    tasks: tuple[str, ...] | None = None
    """Only these tasks of an item."""
    seeds: int | None = None
    """How many seeds (default: those of the scale)."""
    jobs: int = 1
    """Cells measured at a time, each in a process of its own. Under torchrun all processes train
    one model together instead."""
    threads: int = 1
    """CPU threads of a cell."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    model: str | None = None
    """Pre-trained model (folder, .gguf file or Hugging Face id), for items that need one."""
    data: Path | None = None
    """Folder of the data sets, for items that need any (default: NESTLEARN_DATA)."""
    out: Path = Path("reproductions")
    """Folder for the results."""
    report: bool = False
    """Measure nothing; print and write the reports of what is there."""
    fresh: bool = False
    """Drop earlier results."""

    def run(self) -> int:
        """Measure and report; returns the exit status."""
        from nestlearn.evals.registry import EXPERIMENTS, experiment

        if self.list or not self.names:
            _list()
            return 0
        for name in ("jobs", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be 1 or more, got {getattr(self, name)}")
        if self.seeds is not None and self.seeds < 1:
            raise ValueError(f"--seeds must be 1 or more, got {self.seeds}")
        names = tuple(EXPERIMENTS) if self.names == ("all",) else self.names
        items = [experiment(name, self.scale) for name in names]  # unknown names: before any work
        if self.model is None and not self.report:
            missing = [item.name for item in items if item.needs_model]
            if missing and self.names != ("all",):
                raise ValueError(
                    f"{', '.join(missing)}: a pre-trained model is needed; name it with --model"
                )
            if missing:
                print(f"left out, for want of a pre-trained model (--model): {', '.join(missing)}")
                items = [item for item in items if not item.needs_model]
        if self.data is not None:
            if not self.data.is_dir():
                raise ValueError(f"--data: no folder {self.data}")
            os.environ["NESTLEARN_DATA"] = str(self.data.resolve())

        from nestlearn.evals.harness.experiment import Request
        from nestlearn.evals.harness.report import print_tables, write_report
        from nestlearn.evals.harness.run import open_results, run
        from nestlearn.train.distributed import Distributed

        together = Distributed.start(_device(self.device))
        request = Request(
            self.systems, self.tasks, self.seeds, _device(self.device), self.model, self.fresh
        )
        failed = 0
        for item in items:
            path = self.out / self.scale / f"{item.name}.json"
            results = open_results(item, path, request, self.threads, self.fresh)
            if not self.report:
                if together.main:
                    print(f"{item.item}: {item.title} ({self.scale}) -> {path}")
                failed += run(item, results, request, self.jobs, self.threads)
            if not together.main:
                continue
            print_tables(item.tables(results))
            if results.record["rows"]:
                written = write_report(item, results)
                print("written: " + ", ".join(map(str, [path, *written])))
        together.close()
        if failed and together.main:
            print(f"{failed} cells failed; their errors are in the result files")
        return int(failed > 0)


def _list() -> None:
    from nestlearn.evals.harness.systems import SYSTEMS
    from nestlearn.evals.registry import EXPERIMENTS, experiment

    width = max(map(len, EXPERIMENTS))
    for name in EXPERIMENTS:
        item = experiment(name)
        needs = " (needs --model)" if item.needs_model else ""
        print(f"{name:<{width}}  {item.item}: {item.title} [{', '.join(item.scales)}]{needs}")
    print(f"\nsystems: {', '.join(SYSTEMS)}")
    print("\n`nestlearn reproduce NAME --scale tiny` measures one; `all` everything.")


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no GPU that PyTorch can use")
    try:
        return str(torch.device(name))
    except RuntimeError:
        raise ValueError(f"--device must be cpu, cuda or auto, got {name!r}") from None
