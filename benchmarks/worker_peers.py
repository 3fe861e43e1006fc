"""Training steps of other people's code, as installed from PyPI into ``.peers-venv``.

Run by ``train_speed.py`` in the environment ``peers.py`` makes, one process for each cell; answers
requests on standard input (see ``serve.py``).
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from rule_alone import rule_trial
from serve import Trial, serve, training_step
from torch import Tensor, nn

VOCAB = 256


def _tokens(batch: int, length: int) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))


def _size(module: nn.Module) -> int:
    return sum({p.data_ptr(): p.numel() for p in module.parameters()}.values())


def titans_mac(
    dim: int, layers: int, heads: int, batch: int, length: int, chunk: int | None = None
) -> Trial:
    """titans-pytorch's memory-as-context Transformer: segments of 128, memory in every layer;
    ``chunk`` None leaves its memory chunk at the default (the segment)."""
    from titans_pytorch import MemoryAsContextTransformer

    model = MemoryAsContextTransformer(
        num_tokens=VOCAB,
        dim=dim,
        depth=layers,
        segment_len=128,
        neural_memory_segment_len=chunk,
        heads=heads,
        dim_head=dim // heads,
    )
    data = _tokens(batch, length + 1)
    step = training_step(model, lambda: model(data, return_loss=True))
    return Trial(step, batch * length, _size(model), {"segment": 128, "chunk": chunk or 128})


def titans_memory(
    dim: int,
    batch: int,
    length: int,
    chunk: int,
    heads: int = 1,
    depth: int = 2,
    expansion: float = 4.0,
    renew: bool = False,
) -> Trial:
    """One titans-pytorch NeuralMemory layer. ``renew``: take each chunk's gradient at that chunk's
    start (its ``batch_size`` option) in the place of the sequence's start, its default."""
    from titans_pytorch import NeuralMemory

    layer = NeuralMemory(
        dim=dim,
        chunk_size=chunk,
        heads=heads,
        dim_head=dim // heads,
        batch_size=chunk if renew else None,
        default_model_kwargs={"depth": depth, "expansion_factor": expansion},
    )
    # With several heads its per-head initial weights are views of one storage, which AdamW refuses.
    for i, parameter in enumerate(layer.memory_model_parameters):
        layer.memory_model_parameters[i] = nn.Parameter(parameter.detach().clone())
    x = torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()

    def loss() -> Tensor:
        x.grad = None
        return layer(x)[0].square().mean()

    return Trial(training_step(layer, loss), batch * length, _size(layer))


def nested_learning(
    dim: int,
    layers: int,
    heads: int,
    batch: int,
    length: int,
    write: bool,
    chunk: int = 1,
    memory_chunk: int | None = None,
    variant: str = "hope_selfmod",
) -> Trial:
    """nested-learning's Hope. ``write`` follows its own training loop: a fresh fast state for every
    sequence, loss and backward, optimizer step, then the pass that writes (not differentiated)."""
    from nested_learning.levels import LevelSpec
    from nested_learning.model import HOPEModel, ModelConfig
    from nested_learning.training import compute_teach_signal

    model = HOPEModel(
        ModelConfig(
            vocab_size=VOCAB,
            dim=dim,
            num_layers=layers,
            heads=heads,
            titan_level=LevelSpec("titan", 16),
            cms_levels=[LevelSpec("cms", 1 if not write else 64)],
            block_variant=variant,
            self_mod_chunk_size=chunk,
            self_mod_chunk_size_memory=memory_chunk,
        )
    )
    data = _tokens(batch, length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> float:
        state = model.init_fast_state() if write else None
        logits = model(data, fast_state=state) if write else model(data)
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), data[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if write:
            with torch.no_grad():
                signal = compute_teach_signal(model, logits, data)
                model(data, teach_signal=signal, fast_state=state)
        return float(loss.detach())

    return Trial(step, batch * length, _size(model))


class NaiveGatedDelta(nn.Module):
    """flash-linear-attention's naive chunk function inside the smallest layer that can hold it."""

    def __init__(self, dim: int, heads: int, chunk: int) -> None:
        super().__init__()
        self.heads, self.chunk = heads, chunk
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.conv = nn.Conv1d(3 * dim, 3 * dim, 4, groups=3 * dim, padding=3)
        self.gates = nn.Linear(dim, 2 * heads)
        self.gate = nn.Linear(dim, dim, bias=False)
        self.norm = nn.RMSNorm(dim // heads)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule

        mixed = self.conv(self.qkv(x).transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        q, k, v = F.silu(mixed).unflatten(-1, (3, self.heads, -1)).unbind(2)
        beta, decay = self.gates(x).chunk(2, -1)
        y, _ = naive_chunk_gated_delta_rule(
            F.normalize(q, dim=-1),
            F.normalize(k, dim=-1),
            v,
            g=F.logsigmoid(decay + 4),
            beta=beta.sigmoid(),
            chunk_size=self.chunk,
        )
        return self.out(self.norm(y).flatten(2) * F.silu(self.gate(x)))


def fla_layer(dim: int, heads: int, batch: int, length: int, chunk: int = 64) -> Trial:
    """A gated DeltaNet layer around flash-linear-attention's naive chunk code."""
    layer = NaiveGatedDelta(dim, heads, chunk)
    x = torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()

    def loss() -> Tensor:
        x.grad = None
        return layer(x).square().mean()

    return Trial(training_step(layer, loss), batch * length, _size(layer))


def fla_rule(chunk: int = 64, **sizes: int) -> Trial:
    """The naive chunk function alone."""
    from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule

    def rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        return naive_chunk_gated_delta_rule(q, k, v, g=g, beta=beta, chunk_size=chunk, scale=1.0)[0]

    return rule_trial(rule, **sizes)


BUILDERS = {
    "titans_mac": titans_mac,
    "titans_memory": titans_memory,
    "nested_learning": nested_learning,
    "fla_layer": fla_layer,
    "fla_rule": fla_rule,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    torch.manual_seed(0)
    serve(BUILDERS)
