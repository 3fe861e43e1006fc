"""Data parallelism: what one process of ``torchrun`` must know, and a few collective operations.

Every step's batch is the same set of sequences however many processes share it, so a run with two
processes follows the loss curve of a run with one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Distributed:
    """This process among all processes of the run.

    Attributes:
        rank, world: number of this process, number of processes.
        device: where this process computes.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def start(cls, device: str = "auto") -> Distributed:
        """Join the processes that ``torchrun`` started; alone if it started none.

        Raises:
            ValueError: a device that this machine does not have.
        """
        world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        chosen = _device(device, int(os.environ.get("LOCAL_RANK", 0)))
        if world > 1 and not dist.is_initialized():
            backend = "nccl" if chosen.type == "cuda" else "gloo"
            # Rank 0 tokenises while the others wait; large data takes hours.
            dist.init_process_group(backend, timeout=datetime.timedelta(hours=12))
        return cls(rank, world, chosen)

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def close(self) -> None:
        """Leave the group."""
        if self.world > 1 and dist.is_initialized():
            # Gloo's threads need the interpreter lock to release the tensors of the last exchange;
            # freeing the group while we hold that lock would wait for them forever (seen in one of
            # five runs), and one that asks for it when the interpreter ends aborts the process
            # (seen once on a loaded machine, without this wait). Sleeping gives the lock away.
            time.sleep(0.3)
            dist.destroy_process_group()

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Run a block in rank 0 before the others (which then find its files)."""
        if not self.main:
            self._meet(True)
        succeeded = False
        try:
            yield
            succeeded = True
        finally:
            if self.main:
                self._meet(succeeded)

    def _meet(self, fine: bool) -> None:
        """Wait for all; fails in every process if rank 0 did."""
        if self.world > 1 and self.sum(torch.tensor([float(self.main and not fine)])).item():
            if self.main:
                return  # its own error is on its way
            raise SystemExit(1)

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            self.sum(torch.zeros(1))

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over processes."""
        if self.world == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over processes (a new tensor, on the device)."""
        values = values.to(self.device, copy=True)
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Mean over processes, in place; all have tensors of the same shapes, on the device."""
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        flat /= self.world
        for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in rank 0 (elsewhere an empty list)."""
        if self.world == 1:
            return [value]
        found: list[Any] | None = [None] * self.world if self.main else None
        dist.gather_object(value, found)
        return found or []

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, everywhere."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def share(self, count: int) -> slice:
        """This process's part of ``count`` rows.

        Raises:
            ValueError: ``count`` cannot be divided by the number of processes.
        """
        if count % self.world:
            raise ValueError(
                f"batch_size {count} cannot be shared by {self.world} processes; use a multiple"
            )
        size = count // self.world
        return slice(self.rank * size, (self.rank + 1) * size)


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"no device {name!r}; use auto, cpu or cuda") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("device 'cuda': this machine or this build of torch has none; use cpu")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device
