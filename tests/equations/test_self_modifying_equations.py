"""Self-modifying Titans against an independent statement of SPEC §5: a loop over tokens in which
the inner gradients come from torch.autograd on the stated objective; float64, values and gradients.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nestlearn.nn import SelfModifyingTitans

DIM, HEADS, TOKENS = 6, 2, 7
VARIANTS = [
    {},
    {"memory_chunk": 1, "projection_chunk": 1},
    {"memory_chunk": 3, "projection_chunk": 2},
    {"memory_chunk": 2, "projection_chunk": 4},
    {"objective": "l2"},
    {"objective": "l2", "memory_depth": 3, "memory_width": 5},
    {"memory_depth": 1},
    {"memory_depth": 4},
    {"rule": "gd"},
    {"momentum": True},
    {"momentum": True, "memory_chunk": 1, "projection_chunk": 1},
    {"momentum": True, "rule": "gd", "objective": "l2"},
    {"weight_decay": False},
    {"adaptive": ()},
    {"adaptive": ("v", "alpha")},
    {"adaptive": ("k", "v", "q", "eta", "alpha")},
    {"readout": "token"},
    {"readout": "token", "memory_chunk": 5, "memory_depth": 3},
    {"readout": "token", "momentum": True},
    {"eta_max": 0.3},
    {"retention": "zero"},
    {"retention": "zero", "readout": "token", "objective": "l2", "memory_depth": 3},
    {"retention": "zero", "momentum": True, "readout": "token"},
    {"retention": "zero", "rule": "gd", "momentum": True},
    {"targets": "shared"},
    {"targets": "shared", "memory_chunk": 1, "projection_chunk": 1, "objective": "l2"},
    {"truncate": True, "readout": "token"},
    {"truncate": True, "readout": "token", "rule": "gd", "objective": "l2"},
    {"truncate": True, "readout": "token", "retention": "zero", "memory_chunk": 2},
    {"retention": "zero", "memory_chunk": 1, "projection_chunk": 1},
    {"counters": 4},
    {"counters": 1, "memory_chunk": 1, "projection_chunk": 1, "adaptive": ()},
]


def unit(x):
    return x / (x.square().sum() + 1e-6).sqrt()


def answer(weights, x):
    """M(x) = x + W_L silu(... W_1 x), or W x."""
    if len(weights) == 1:
        return weights[0] @ x
    h = x
    for w in weights[:-1]:
        h = F.silu(w @ h)
    return x + weights[-1] @ h


def layer_inputs(weights, x):
    found = [x]
    for w in weights[:-1]:
        found.append(F.silu(w @ found[-1]))
    return found


class Memory:
    """One memory of one head of one row, written token by token with its chunk's frozen gradient.

    ``start``: weights at the chunk's start; ``now``: after the last token; ``read``: what a
    token-level read-out sees (after the token's write, before the guard at the chunk's end)."""

    def __init__(self, weights, group, beta):
        self.start = self.now = self.initial = list(weights)
        self.bounds = [1.5 * w.detach().norm(dim=1, keepdim=True).clamp(min=1) for w in weights]
        self.momentum = [torch.zeros_like(w) for w in weights]
        self.chunk, self.rule, self.beta, self.count = group.chunk, group.rule, beta, 0
        self.truncate = group.truncate

    def learn(self, k, v, eta, alpha):
        target = unit(answer(self.start, v)) if self.rule.targets == "generated" else v
        # Aliases: the inner step sees the target as a constant, the outer gradient goes through it.
        alias = [w * 1 for w in self.start]
        y = answer(alias, k)
        if self.rule.objective == "dot":
            loss = -(y * target).sum()
        else:
            loss = 0.5 * (y - target).square().sum()
        inner = torch.autograd.grad(loss, alias, create_graph=True)
        new = []
        for i, a in enumerate(layer_inputs(self.start, k)):
            step = eta / (1 + eta * a.square().sum())
            home = self.initial[i] if self.rule.retention == "initial" else 0
            kept = home + alpha * (self.now[i] - home)
            if self.rule.delta:
                kept = kept - step * self.now[i] @ torch.outer(a, a)
            change = -step * inner[i]
            if self.beta is not None:
                change = self.momentum[i] = self.beta * self.momentum[i] + change
            new.append(kept + change)
        self.now = self.read = new
        self.count += 1
        if self.count % self.chunk == 0:
            self.start = self.now = [
                w * (b / torch.maximum(w.norm(dim=1, keepdim=True), b))
                for w, b in zip(new, self.bounds, strict=True)
            ]
            if self.truncate:
                self.start = self.now = [
                    i + (w - i).detach() for i, w in zip(self.initial, self.now, strict=True)
                ]


def convolved(x, kernel):
    """Every channel over a window that ends at the token; what was before the first is zero."""
    width = kernel.shape[1]
    padded = torch.cat([x.new_zeros(len(x), width - 1, x.shape[-1]), x], 1)
    return torch.stack(
        [(padded[:, t : t + width].mT * kernel).sum(-1) for t in range(x.shape[1])], 1
    )


def oracle(layer, x):
    """The layer's output, computed row by row, head by head, token by token."""
    size = DIM // HEADS
    values = [layer.count_proj(x)] if layer.counters else []
    x = convolved(x, layer.in_conv.weight[:, 0])
    conv = convolved(torch.cat([layer.in_proj(x), *values], -1), layer.conv.weight[:, 0])
    widths = [DIM] * 3 + [DIM + layer.counters, layer.counters]
    streams = dict(zip(("k", "v", "q", "gate", "count"), conv.split(widths, -1), strict=True))
    group, main = layer.projections, layer.memory
    rows = []
    for b in range(len(x)):
        heads = []
        for h in range(HEADS):
            cut = slice(h * size, (h + 1) * size)
            beta = None if main.momentum_logit is None else main.momentum_logit[h].sigmoid()
            memories = {}
            if group is not None:
                gbeta = None if beta is None else group.momentum_logit[h].sigmoid()
                for n, role in enumerate(group.roles):
                    weights = [w[h, n] for w in group.initial_weights(x.dtype)]
                    memories[role] = Memory(weights, group, gbeta)
            memory = Memory([w[h, 0] for w in main.initial_weights(x.dtype)], main, beta)
            outs = []
            for t in range(x.shape[1]):
                raw = {}
                for role in ("k", "v", "q"):
                    if role in memories:
                        raw[role] = answer(memories[role].start, unit(streams[role][b, t, cut]))
                    else:
                        raw[role] = streams[role][b, t, cut]
                for role in ("eta", "alpha"):
                    if role in memories:
                        y = answer(memories[role].start, unit(streams["v"][b, t, cut]))
                        raw[role] = group.readout[role][h] @ y
                    elif role in layer.fixed_scalars:
                        fixed = layer.scalar_proj(x[b, t])
                        raw[role] = fixed[layer.fixed_scalars.index(role) * HEADS + h]
                k, v, q = unit(raw["k"]), unit(raw["v"]), unit(raw["q"])
                eta = layer.gates.eta_max * torch.sigmoid(raw["eta"] + layer.gates.eta_bias[h])
                alpha = x.new_ones(())
                if layer.gates.alpha_bias is not None:
                    alpha = torch.sigmoid(raw["alpha"] + layer.gates.alpha_bias[h])
                before = memory.start
                for m in (*memories.values(), memory):
                    m.learn(k, v, eta, alpha)
                o = answer(before if main.readout == "chunk" else memory.read, q)
                o = o * torch.rsqrt(o.square().mean() + 1e-6) * layer.norm_weight[h]
                outs.append(o * F.silu(streams["gate"][b, t, cut]))
            heads.append(torch.stack(outs))
        if layer.counters:
            gate = streams["gate"][b, :, DIM:]
            heads.append(counted(streams["count"][b]) * layer.count_weight * F.silu(gate))
        rows.append(torch.cat(heads, -1))
    return layer.out_proj(torch.stack(rows))


def counted(values):
    """The counters: gradient descent on -<M 1, v>, one step a token."""
    outs, M = [], values.new_zeros(values.shape[1], 1).requires_grad_()
    for v in values:
        alias = M * 1
        loss = -((alias @ values.new_ones(1)) * v).sum()
        M = M - torch.autograd.grad(loss, alias, create_graph=True)[0]
        read = M @ values.new_ones(1)
        outs.append(read / (4 + read.abs()))
    return torch.stack(outs)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_layer_equals_token_recurrence(variant):
    settings = {
        "memory_chunk": 3,
        "projection_chunk": 3,
        "memory_width": 4,
        "readout": "chunk",
    } | variant
    layer = SelfModifyingTitans(DIM, HEADS, **settings).double()
    for name, p in layer.named_parameters():
        if name.endswith("momentum_logit"):
            nn.init.uniform_(p, -1, 1)  # a decay that shows
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64, requires_grad=True)
    y, _ = layer(x)
    expected = oracle(layer, x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-11)

    weight = torch.randn_like(y)
    wanted = [x, *layer.parameters()]
    ours = torch.autograd.grad((y * weight).sum(), wanted)
    theirs = torch.autograd.grad((expected * weight).sum(), wanted)
    names = ["x", *(n for n, _ in layer.named_parameters())]
    for name, a, b in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
        assert a.abs().sum() > 0, f"no outer gradient reaches {name}"
