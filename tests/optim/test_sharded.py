"""Sharded parameters: two gloo processes make the same steps as one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys, warnings
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from nestlearn.optim import DGD, M3, AssociativeMomentum, DeepMomentum, DeltaMomentum
from nestlearn.train.distributed import Distributed
from tests.optim.models import loss_of, tiny_lm

processes = Distributed.start("cpu")
mesh = init_device_mesh("cpu", (2,))
warnings.simplefilter("ignore", RuntimeWarning)

def two_groups(preset, **options):
    def make(m):
        named = list(m.named_parameters())
        return AssociativeMomentum([
            {"params": [(n, p) for n, p in named if p.ndim > 1]},
            {"params": [(n, p) for n, p in named if p.ndim < 2], "output": "identity",
             "scale": None}], preset, **options)
    return make

makers = {
    "M3": lambda m: M3(m, lr=0.01, frequency=2, ns_dtype=None),
    "adam": lambda m: AssociativeMomentum(m, "adam", lr=0.01),
    "adamuon": two_groups("adamuon", lr=0.01, ns_dtype=None),
    "shampoo": lambda m: AssociativeMomentum(m, "shampoo", lr=0.01),
    "delta": lambda m: AssociativeMomentum(m, "delta", lr=0.01),
    "DeltaMomentum": lambda m: DeltaMomentum(m, lr=0.01, normalize=True),
    "DeepMomentum": lambda m: DeepMomentum(m, lr=0.01),
    "DGD": lambda m: DGD(m, lr=0.1, momentum=0.9),
}
for name, make in makers.items():
    alone, shared = tiny_lm(), tiny_lm()
    fully_shard(shared, mesh=mesh)
    a, b = make(alone), make(shared)
    for step in range(5):
        for model, optimizer in ((alone, a), (shared, b)):
            optimizer.zero_grad()
            loss_of(model, step).backward()
        if step == 3:  # one process's part of one gradient is bad
            alone.up.weight.grad[0, 0] = float("nan")
            part = shared.up.weight.grad.to_local()
            if processes.main:
                part[0, 0] = float("nan")
        a.step(), b.step()
    for (key, p), q in zip(alone.named_parameters(), shared.parameters()):
        assert isinstance(q, DTensor)
        torch.testing.assert_close(p.detach(), q.full_tensor(), rtol=1e-7, atol=1e-9,
                                   msg=lambda m: f"{name} {key}: {m}")
    assert a.skipped == b.skipped == 1, (name, a.skipped, b.skipped)
    if hasattr(a, "close"):
        a.close(), b.close()
    if processes.main:
        print("same", name, flush=True)
processes.barrier()
processes.close()
"""


def test_two_processes_equal_one(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    (tmp_path / "sharded.py").write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                   "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}"}  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node=2", str(tmp_path / "sharded.py")]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("same ") == 8
