"""Depthwise causal convolution, the short-term context in front of a memory's projections."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CausalConv(nn.Module):
    """Depthwise causal convolution with an explicit history.

    ``y_t[c] = sum_j w[c, W-1-j] x_{t-j}[c]`` for j = 0 … W-1 (SPEC §5: window W = 4). It
    starts as the identity plus a little noise: an untrained layer sees its own token first.

    Args:
        dim: channels D.
        size: window length W >= 1.

    Shapes: ``forward(x (B, T, D), history (B, W-1, D)) -> (y (B, T, D), history)``.

    Example:
        >>> conv = CausalConv(8)
        >>> y, history = conv(torch.randn(2, 5, 8), conv.init_history(2))
        >>> history.shape
        torch.Size([2, 3, 8])
    """

    def __init__(self, dim: int, size: int = 4):
        super().__init__()
        if size < 1:
            raise ValueError(f"conv size must be at least 1, got {size}")
        self.dim, self.size = dim, size
        self.weight = nn.Parameter(torch.empty(dim, 1, size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Identity on the current token, small noise on the earlier ones."""
        with torch.no_grad():
            self.weight.uniform_(-0.3, 0.3)
            self.weight[..., -1] = 1.0

    def init_history(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The inputs before the first token: zeros."""
        return torch.zeros(
            batch_size,
            self.size - 1,
            self.dim,
            device=device or self.weight.device,
            dtype=dtype or self.weight.dtype,
        )

    def forward(self, x: Tensor, history: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve ``x`` after ``history``; returns the output and the new history."""
        length = x.shape[1]
        padded = torch.cat([history.to(x.dtype), x], dim=1) if self.size > 1 else x
        # A conv2d of height 1 in channels-last layout: x is (B, T, D) already, so nothing is
        # transposed; on CPU 3 to 30 times faster (forward + backward) than a grouped conv1d.
        columns = padded.transpose(1, 2).unsqueeze(2).contiguous(memory_format=torch.channels_last)
        y = F.conv2d(columns, self.weight.to(x.dtype).unsqueeze(2), groups=self.dim)
        return y.squeeze(2).transpose(1, 2), padded[:, length:]
