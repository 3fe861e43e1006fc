"""What a call of `Learner.learn` reports."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass
class Learned:
    """What a call of `Learner.learn` did.

    Attributes:
        tokens, documents: how much was read.
        loss: mean surprise of the tokens when they were read first, in nats.
        updates: how often each level was updated.
        surprise: per level, the mean surprise within its last period.
        skipped: segments left out because their loss or gradient was not finite.
        seconds: time it took.
        stopped: whether it was asked to stop before the end.
    """

    tokens: int = 0
    documents: int = 0
    loss: float = math.nan
    updates: dict[str, int] = dataclasses.field(default_factory=dict)
    surprise: dict[str, float] = dataclasses.field(default_factory=dict)
    skipped: int = 0
    seconds: float = 0.0
    stopped: bool = False

    @property
    def tokens_per_second(self) -> float:
        """Reading speed, learning included."""
        return self.tokens / self.seconds if self.seconds else 0.0
