"""Two processes of torchrun train the models of a table together: the results are those of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nestlearn.evals.harness.results import read
from nestlearn.evals.harness.systems import Size
from nestlearn.evals.harness.task import TRAIN
from nestlearn.evals.harness.trained import Plan, training
from nestlearn.evals.mqar import AssociativeRecall
from nestlearn.train.distributed import Distributed

SCRIPT = """
import sys
from pathlib import Path
from nestlearn.cli.reproduce import Reproduce
from nestlearn.evals.formal_languages import FormalLanguages
from nestlearn.evals.harness.systems import Size
from nestlearn.evals.harness.trained import Plan

plan = Plan(Size(32, 1, 2), steps=6, batch=8, lrs=(1e-3,), weight_decays=(0.0,), examples=20)
FormalLanguages.plans = {"tiny": plan}
if __name__ == "__main__":
    name, systems = sys.argv[2], sys.argv[3:] or None
    tasks = ("parity", "shuffle2") if name == "table5" else None
    sys.exit(Reproduce((name,), systems=systems, tasks=tasks, seeds=1, out=Path(sys.argv[1]),
                       device="cpu").run())
"""


def run(tmp_path: Path, out: str, processes: int, *names: str) -> subprocess.CompletedProcess:
    script = tmp_path / "reproduce.py"
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                   "PYTHONPATH": str(Path(__file__).parents[2] / "src")}  # fmt: skip
    command = [sys.executable, *launcher, str(script), str(tmp_path / out), *names]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    names = ("table5", "linear_attention", "hope")
    for out, processes in (("one", 1), ("two", 2)):
        done = run(tmp_path, out, processes, *names)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("written:") == 1  # one process speaks
    one, two = (read(tmp_path / out / "tiny" / "table5.json")["rows"] for out in ("one", "two"))
    assert [r["cell"] for r in one] == [r["cell"] for r in two] and len(one) == 4
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5), a["cell"]
        assert b["bin1"]["loss"] == pytest.approx(a["bin1"]["loss"], abs=1e-4), a["cell"]
    again = run(tmp_path, "two", 2, *names)  # nothing is left to do
    assert again.returncode == 0, again.stderr
    assert "final/" not in again.stderr


def test_an_item_without_training_wants_one_process(tmp_path: Path) -> None:
    done = run(tmp_path, "x", 2, "fig4")
    assert done.returncode != 0
    assert "run it without torchrun" in done.stderr


def test_shares_weigh_what_they_ask() -> None:
    """Mean over processes of the shares' losses: the loss of the whole batch."""
    import torch

    task = AssociativeRecall(pairs=(2, 4), vocab_size=32, shortest=16)
    plan = Plan(Size(8, 1, 1), steps=1, batch=4, lrs=(1e-3,))
    logits = {}

    def answer(inputs: torch.Tensor, use_cache: bool) -> object:
        table = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
        logits["x"] = table[inputs].requires_grad_()
        return type("Answer", (), {"logits": logits["x"]})

    def first(together: Distributed) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        losses = training(task, plan, generator, "cpu", together)
        return next(iter(losses))(answer)

    shares = [first(Distributed(rank, 2)) for rank in range(2)]
    assert torch.allclose(sum(shares) / 2, first(Distributed()))
    assert task.draw(TRAIN, 4, torch.Generator().manual_seed(0)).asked.any()
