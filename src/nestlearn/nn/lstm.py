"""The long short-term memory as a mixer: the recurrent baseline of Tab. 5."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from nestlearn.memory.state import MemoryState
from nestlearn.nn.recurrent import RecurrentMixer


def lstm_step(
    x: Tensor, h: Tensor, c: Tensor, w_x: Tensor, w_h: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: ``i, f, g, o = W_x x + W_h h + b``; ``c = s(f) c + s(i) tanh(g)``;
    ``h = s(o) tanh(c)``. Returns h and c."""
    i, f, g, o = (x @ w_x.mT + h @ w_h.mT + bias).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


class LSTM(RecurrentMixer):
    """Long short-term memory (Hochreiter & Schmidhuber 1997; torch's gates) and a projection.

        i, f, g, o = W_x x_t + W_h h_{t-1} + b
        c_t = s(f) c_{t-1} + s(i) tanh(g)      h_t = s(o) tanh(c_t)      y_t = W_o h_t

    Each token's gates need the token's before, so nothing is parallel over tokens. A frozen state
    is read and kept: every token then is a single step from it.

    Args:
        dim: width D of the layer and of h and c.

    Shapes: ``forward(x (B, T, D), state=None, mask=None (B, T)) -> (y (B, T, D), state)``;
    ``state.weights`` is ``(h, c)``, each ``(B, D)``.

    Raises:
        ValueError: ``dim`` below 1.

    Example:
        >>> layer = LSTM(64)
        >>> y, state = layer(torch.randn(1, 40, 64))
        >>> y, state = layer(torch.randn(1, 5, 64), state)
        >>> state.position
        (45,)
    """

    def __init__(self, dim: int):
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.dim = dim
        # As in torch.nn.LSTM, which holds two biases; torch.compile refuses that module.
        self.weight_ih = nn.Parameter(torch.empty(4 * dim, dim))
        self.weight_hh = nn.Parameter(torch.empty(4 * dim, dim))
        self.bias = nn.Parameter(torch.empty(4 * dim))
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch's uniform start, but forget gates start open (bias 1)."""
        bound = 1 / math.sqrt(self.dim)
        with torch.no_grad():
            for parameter in (self.weight_ih, self.weight_hh, self.bias):
                parameter.uniform_(-bound, bound)
            self.bias[self.dim : 2 * self.dim] = 1.0

    def init_state(
        self,
        batch_size: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> MemoryState:
        """The state before the first token: zeros."""
        weight = self.out_proj.weight
        zero = torch.zeros(
            batch_size, self.dim, device=device or weight.device, dtype=dtype or weight.dtype
        )
        return MemoryState((zero, zero.clone()), position=(0,) * batch_size)

    def _forward(self, x: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
        h, c = (t.to(x.dtype) for t in state.weights)
        if state.frozen:
            parameters = self.weight_ih, self.weight_hh, self.bias
            out, _ = lstm_step(x, h[:, None], c[:, None], *parameters)
            return self.out_proj(out), state
        out, h, c = self._read(x, h, c)
        held = tuple(new.to(old.dtype) for new, old in zip((h, c), state.weights, strict=True))
        position = tuple(p + x.shape[1] for p in state.position)
        return self.out_proj(out), dataclasses.replace(state, weights=held, position=position)

    def _read(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parameters = self.weight_ih, self.weight_hh, self.bias
        if torch.compiler.is_compiling():  # which torch's own loop is not made for
            outputs = []
            for token in x.unbind(1):
                h, c = lstm_step(token, h, c, *parameters)
                outputs.append(h)
            return torch.stack(outputs, 1), h, c
        out, h, c = torch.lstm(
            x, (h[None].contiguous(), c[None].contiguous()),
            [*parameters, torch.zeros_like(self.bias)],
            True, 1, 0.0, self.training, False, True,
        )  # fmt: skip
        return out, h[0], c[0]
