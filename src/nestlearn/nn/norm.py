"""Root-mean-square normalisation, the pre-norm of every block.

``y = g * x / sqrt(mean(x^2) + eps)`` with a learned gain ``g`` (initially 1). This is torch's own
layer under the library's name: it computes the mean in fp32 for half-precision inputs.
"""

from torch.nn import RMSNorm

__all__ = ["RMSNorm"]
