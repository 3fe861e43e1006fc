"""Two gloo processes follow the loss curve of one, at the same global batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nestlearn.train import Distributed, read_log

ARGUMENTS = [
    "train", "--preset", "tiny", "--mixer", "attention", "--set", "cms_periods=[1,3]",
    "--set", "hidden_size=32", "--set", "intermediate_size=64", "--seq-len", "32",
    "--batch-size", "8", "--steps", "8", "--eval-every", "4", "--option", "log_every=1",
    "--option", "eval_sequences=7",
]  # fmt: skip


def run(tmp_path: Path, out: str, processes: int, *more: str) -> subprocess.CompletedProcess:
    launcher = ["-m"]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone",
                    f"--nproc-per-node={processes}", "-m"]  # fmt: skip
    environment = {**os.environ, "NESTLEARN_CACHE": str(tmp_path / "cache"),
                   "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                   "PYTHONPATH": str(Path(__file__).parents[2] / "src")}  # fmt: skip
    places = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / out)]
    command = [sys.executable, *launcher, "nestlearn.cli.main", *ARGUMENTS,
               *places, *more]  # fmt: skip
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"{n} plus {n % 7} is {n + n % 7}." for n in range(3000)))
    return path


def test_two_processes_follow_one(tmp_path: Path, text: Path) -> None:
    one = run(tmp_path, "one", 1)
    assert one.returncode == 0, one.stderr
    two = run(tmp_path, "two", 2, "--accumulate", "2")
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("done: 8 steps") == 1  # one process speaks
    for event in ("step", "eval"):
        a, b = (read_log(tmp_path / out, event) for out in ("one", "two"))
        assert [r["step"] for r in a] == [r["step"] for r in b]
        assert [r["loss"] for r in b] == pytest.approx([r["loss"] for r in a], abs=1e-5)
    # What two processes saved, one can continue.
    more = run(tmp_path, "two", 1, "--steps", "10")
    assert more.returncode == 0, more.stderr
    assert "2 processes saved this run, 1 continue it" in more.stdout
    assert [r["step"] for r in read_log(tmp_path / "two", "step")] == list(range(1, 11))


def test_an_error_in_one_process_ends_all(tmp_path: Path) -> None:
    result = run(tmp_path, "x", 2)
    assert result.returncode != 0
    assert "no such file or folder" in result.stderr


def test_shares_of_a_batch() -> None:
    assert Distributed(rank=1, world=2).share(8) == slice(4, 8)
    with pytest.raises(ValueError, match="batch_size 9 cannot be shared by 2 processes"):
        Distributed(world=2).share(9)


def test_devices(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Distributed.start("auto").device.type == "cpu"
    with pytest.raises(ValueError, match="no device 'gpu'"):
        Distributed.start("gpu")
    with pytest.raises(ValueError, match="has none; use cpu"):
        Distributed.start("cuda")
