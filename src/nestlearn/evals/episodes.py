"""Tasks that are new in every sequence: points with their answers, then a point whose answer is
asked. Functions follow Garg et al. (2022), "What can Transformers learn in-context?"."""

from __future__ import annotations

from abc import abstractmethod
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from nestlearn.evals.harness.task import IGNORE, TRAIN, VALIDATION, Batch, Task

NOISE = 0.1
"""Standard deviation of what is added to every value of a function."""


class Values(Batch):
    """A batch whose targets ``(B, T)`` are numbers; right is what is within `NOISE`."""

    def loss(self, logits: Tensor) -> Tensor:
        """Mean squared error of the first logit where it is asked."""
        return F.mse_loss(logits[..., 0][self.asked].float(), self.targets[self.asked])

    def correct(self, logits: Tensor) -> Tensor:
        """``(B, T)``: the error is at most `NOISE`, or nothing was asked."""
        return ((logits[..., 0] - self.targets).abs() <= NOISE) | ~self.asked


class Episodes(Task):
    """Sequences ``x_1 y_1 x_2 y_2 ... x_n`` in which every x asks for its y.

    A point is a token ``[x, 0, 0]``, an answer ``[0, y, 1]``. In training and validation all
    answers are asked; in the test split ``"k"`` the one behind k examples (of every class).

    Args:
        features: numbers in a point.
        shots: k of the test splits, increasing.

    Attributes:
        answer_size: numbers that an answer takes in a token.
        ways: examples there are for every shot.
    """

    answer_size: int
    ways: int = 1

    def __init__(self, features: int, shots: tuple[int, ...]) -> None:
        self.features, self.shots = features, shots
        self.token_size = features + self.answer_size + 1
        self.splits = tuple(map(str, shots))
        self.length = 2 * self.ways * shots[-1] + 1

    @abstractmethod
    def sample(
        self, count: int, examples: int, balanced: bool, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """``count`` new tasks: points ``(count, examples, features)`` and answers."""

    @abstractmethod
    def encode(self, answers: Tensor) -> Tensor:
        """Answers as they are read, ``(..., answer_size)``."""

    @abstractmethod
    def references(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """What methods without training say of the last point, knowing all before it: scores of
        classes ``(count, classes)``, or values ``(count,)``. All in float64."""

    def episodes(self, split: str, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Points and answers of a split, the last one being the one that is asked in a test."""
        test = split not in (TRAIN, VALIDATION)
        shots = int(split) if test else self.shots[-1]
        return self.sample(count, self.ways * shots + 1, test, generator)

    def draw(self, split: str, count: int, generator: torch.Generator) -> Batch:
        """Sequences of a split."""
        x, y = self.episodes(split, count, generator)
        points = F.pad(x, (0, self.answer_size + 1))
        answers = F.pad(self.encode(y), (self.features, 0))
        answers = F.pad(answers, (0, 1), value=1.0)
        inputs = torch.stack([points, answers], 2).flatten(1, 2)[:, :-1]
        whole = y.is_floating_point()
        targets = torch.full(inputs.shape[:2], 0.0 if whole else IGNORE, dtype=y.dtype)
        asked = torch.zeros(inputs.shape[:2], dtype=torch.bool)
        first = 0 if split in (TRAIN, VALIDATION) else inputs.shape[1] - 1
        targets[:, first::2] = y[:, first // 2 :]
        asked[:, first::2] = True
        return (Values if whole else Batch)(inputs, targets, asked)


class Prototypes(Episodes):
    """Classes that are new in every sequence: ``m_c ~ N(0, s^2 I)`` and ``x ~ N(m_c, I)``.

    Args:
        features, shots: see `Episodes`.
        classes: how many; which is called what means nothing beyond the sequence.
        spread: s.

    Example:
        >>> task = Prototypes(4, (1, 2), classes=3)
        >>> batch = task.draw("2", 5, torch.Generator().manual_seed(0))
        >>> batch.inputs.shape, batch.asked.sum()  # 6 examples, and the point asked
        (torch.Size([5, 13, 8]), tensor(5))
    """

    name = "classification"

    def __init__(
        self, features: int, shots: tuple[int, ...], classes: int = 4, spread: float = 1.0
    ) -> None:
        self.ways = self.answer_size = self.vocab_size = classes
        self.spread = spread
        super().__init__(features, shots)

    def sample(
        self, count: int, examples: int, balanced: bool, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Labels drawn evenly; ``balanced``: all but the last one equally often."""
        labels = torch.randint(self.ways, (count, examples), generator=generator)
        if balanced:
            order = torch.rand(count, examples - 1, generator=generator).argsort(1)
            labels[:, :-1] = order % self.ways
        prototypes = self.spread * torch.randn(count, self.ways, self.features, generator=generator)
        x = prototypes.gather(1, labels[..., None].expand(-1, -1, self.features))
        return x + torch.randn(x.shape, generator=generator), labels

    def encode(self, answers: Tensor) -> Tensor:
        """One-hot."""
        return F.one_hot(answers, self.ways).float()

    def references(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Bayes' rule, and the nearest mean.

        With n examples of a class and their mean m, its prototype is normal around a m, with
        ``a = n s^2 / (1 + n s^2)``, of variance ``s^2 / (1 + n s^2)``; the point asked has 1 more.
        """
        x = x.double()
        member = F.one_hot(y[:, :-1], self.ways).double()
        n = member.sum(1)[..., None]
        mean = torch.einsum("bnc,bnf->bcf", member, x[:, :-1]) / n.clamp(min=1)
        square = self.spread**2
        shrink = n * square / (1 + n * square)
        variance = 1 + square / (1 + n * square)
        last = x[:, -1:]
        exact = -0.5 * ((last - shrink * mean) ** 2 / variance + variance.log()).sum(2)
        return {"Bayes (exact)": exact, "nearest mean": -((last - mean) ** 2).sum(2)}


class Functions(Episodes):
    """Values of a function that is new in every sequence, at normal points, with noise.

    All functions have values of mean square 1 over tasks and points.

    Args:
        name: one of `FAMILIES`.
        features, shots: see `Episodes`.
        active: features that a sparse linear function depends on.
        hidden: units of a network ``sum_j a_j relu(w_j . x)``.
        depth: of a tree, which asks for the sign of one feature at every branch.

    Raises:
        ValueError: an unknown name, or more active features than there are.

    Example:
        >>> task = Functions("linear", 4, (1, 16))
        >>> x, y = task.episodes("16", 1_000, torch.Generator().manual_seed(0))
        >>> said = task.references(x, y)["ridge (exact)"]
        >>> bool(((said - y[:, -1]) ** 2).mean() < 0.02)  # the noise alone is 0.01
        True
    """

    answer_size = 1
    vocab_size = 1
    metric = "loss"

    def __init__(
        self,
        name: str,
        features: int,
        shots: tuple[int, ...],
        active: int = 2,
        hidden: int = 32,
        depth: int = 4,
    ) -> None:
        if name not in FAMILIES:
            raise ValueError(f"unknown functions {name!r}; choose one of {', '.join(FAMILIES)}")
        if name == "sparse" and not 1 <= active <= features:
            raise ValueError(f"active must be 1 to {features} (the features), got {active}")
        self.name, self.active, self.hidden, self.depth = name, active, hidden, depth
        super().__init__(features, shots)

    def sample(
        self, count: int, examples: int, balanced: bool, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Points and values; all functions weigh equally, so that nothing is to be balanced."""
        x = torch.randn(count, examples, self.features, generator=generator)
        y = self.values(x, generator)
        return x, y + NOISE * torch.randn(y.shape, generator=generator)

    def values(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """``(B, n)``: values of B new functions at points ``(B, n, features)``, without noise."""
        count, examples, features = x.shape

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        if self.name in ("linear", "sparse"):
            weights = normal(count, features)
            active = features
            if self.name == "sparse":
                active = self.active
                rank = torch.rand(count, features, generator=generator).argsort(1).argsort(1)
                weights = weights * (rank < active)
            return torch.einsum("bnf,bf->bn", x, weights) / active**0.5
        if self.name == "network":
            inner = torch.einsum("bnf,bhf->bnh", x, normal(count, self.hidden, features)).relu()
            scale = (2 / (self.hidden * features)) ** 0.5
            return scale * torch.einsum("bnh,bh->bn", inner, normal(count, self.hidden))
        # Nodes of a tree in the order of a heap: below node i are 2i + 1 and 2i + 2.
        asks = torch.randint(features, (count, 2**self.depth - 1), generator=generator)
        leaves = normal(count, 2**self.depth)
        node = torch.zeros(count, examples, dtype=torch.long)
        for _ in range(self.depth):
            feature = asks.gather(1, node)[..., None]
            node = 2 * node + 1 + (x.gather(2, feature)[..., 0] > 0)
        return leaves.gather(1, node - (2**self.depth - 1))

    def encode(self, answers: Tensor) -> Tensor:
        """The number itself."""
        return answers[..., None]

    def references(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Ridge regression (for linear functions the posterior mean, and so the best there is),
        the same over all sets of active features, or the mean of the three nearest points.

        For networks and trees ridge regression takes what is not linear for noise of variance 1.
        """
        x, y = x.double(), y.double()
        known, last, seen = x[:, :-1], x[:, -1], y[:, :-1]
        gram, cross = known.mT @ known, (known.mT @ seen[..., None])[..., 0]
        noise = NOISE**2 if self.name in ("linear", "sparse") else 1.0
        ridge = (_ridge(gram, cross, noise * self.features) * last).sum(1)
        if self.name == "linear":
            return {"ridge (exact)": ridge}
        if self.name == "sparse":
            return {"all supports (exact)": self._supports(gram, cross, last), "ridge": ridge}
        distance = ((known - last[:, None]) ** 2).sum(2)
        nearest = distance.topk(min(3, known.shape[1]), largest=False).indices
        return {"ridge": ridge, "3 nearest points": seen.gather(1, nearest).mean(1)}

    def _supports(self, gram: Tensor, cross: Tensor, last: Tensor) -> Tensor:
        """Posterior mean of a sparse function: of every support, weighted by its evidence.

        With weights of variance 1/s on the support S, ``G = X_S' X_S``, ``b = X_S' y`` and
        ``A = G + s sigma^2 I``, twice the log evidence is
        ``b' A^-1 b / sigma^2 - log det(A / (s sigma^2))`` up to what all supports share.
        """
        penalty = self.active * NOISE**2
        logs, said = [], []
        for support in combinations(range(self.features), self.active):
            of = torch.tensor(support)
            part, b = gram[:, of][:, :, of], cross[:, of]
            weights = _ridge(part, b, penalty)
            inner = torch.eye(self.active, dtype=part.dtype) + part / penalty
            logs.append(0.5 * ((b * weights).sum(1) / NOISE**2 - torch.logdet(inner)))
            said.append((weights * last[:, of]).sum(1))
        return (torch.stack(logs, 1).softmax(1) * torch.stack(said, 1)).sum(1)


FAMILIES = ("linear", "sparse", "network", "tree")
"""Kinds of functions."""


def _ridge(gram: Tensor, cross: Tensor, penalty: float) -> Tensor:
    """``(G + penalty I)^-1 b`` of every row."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype)
    return torch.linalg.solve(gram + penalty * eye, cross[..., None])[..., 0]
