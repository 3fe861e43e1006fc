"""The CPU kernel of self-modifying memories (C++, compiled on first use)."""

from nestlearn.nn.native.build import load
from nestlearn.nn.native.kernel import (
    LANES,
    MAX_DEPTH,
    ROLES,
    VECTORS,
    Plan,
    disabled,
    run_chunks,
    usable,
)

__all__ = [
    "LANES",
    "MAX_DEPTH",
    "ROLES",
    "VECTORS",
    "Plan",
    "disabled",
    "load",
    "run_chunks",
    "usable",
]
