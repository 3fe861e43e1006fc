"""Whole completions in a readout: what of them comes next, with nothing decided too early.

    p(c | x) ~ n_c exp(-1/2 (x - m_c)^T S^{-1} (x - m_c))   x: mean state of the prompt
    p(y | x, w) ~ sum of p(c | x) over the c that begin with w, go on with y    w: written so far
    p(y) = (1 - g) p_LM(y) + g p(y | x, w)                  g: how familiar the prompt's end is

Greedy decoding of single tokens commits to the first word that is likeliest by itself; here every
word has the weight of all completions that it can still become. S is the covariance *within*
completions: what differs between them tells them apart and must not be whitened away. Everything
comes from sums over the examples, whatever their order:

    S = (1 - s) S_W + s tau I,   S_W = (sum x x^T - sum_c n_c mu_c mu_c^T) / (N - C)
    m_c = (n_c mu_c + kappa P z_c) / (n_c + kappa)           z_c: mean state of the completion alone

``P z_c`` is what the words of a completion say about its prompts: P is the least-squares map from
the z to the mu, around their centres. kappa, how many examples that is worth (two at most), is the
variance of an example over that of the error of ``P z_c``, both estimated (empirical Bayes). That
error, and the ridge of P, are those of maps from all other completions (leave-one-out).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nestlearn.adaptation.readout_keys import Read

COMPLETIONS = "readout.completions"
"""Target whose rows are ``[sum x; sum z; n]``; ``COMPLETIONS + KEYS``: their tokens."""
LONGEST = 64
"""Tokens of a completion at most; longer ones are learned token by token."""
SHRINKAGE = 0.6
"""s, the share of the identity in the covariance."""
MOST = 0.999
"""Largest g: what was written by nobody stays possible."""
FEW = 0.01
"""Share of the variance of all examples in that within completions."""
RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Ridges of P that are tried, as shares of the mean squared length of z."""
WORTH = 2.0
"""Largest kappa: with one example of each completion no variance can be told from another."""


def as_row(completion: Sequence[int]) -> tuple[float, ...]:
    """Tokens as a row of `COMPLETIONS` + `KEYS`: each plus one, then zeros."""
    return tuple(float(t + 1) for t in completion) + (0.0,) * (LONGEST - len(completion))


def check_rows(rows: Tensor) -> None:
    """Whether these are rows of `as_row`, or zero (ValueError otherwise)."""
    ids = rows.clamp(0, 1 << 24).long()
    ends = (ids[:, :-1] == 0) & (ids[:, 1:] > 0)  # a token behind the end
    used = ids[ids.any(-1)]
    if (ids != rows).any() or ends.any() or len(used.unique(dim=0)) != len(used):
        raise ValueError("the completions of the readout are no tokens, or stand there twice")


class Completions:
    """The completions of a memory, solved (see the module's text).

    Args:
        tokens: a completion per row, see `as_row`, ``(n, LONGEST)``; zero rows are free.
        rows: ``[sum x; sum z; n]``, ``(n, 2r + 1)``.
        scatter: ``sum x x^T (r, r)``.
        shrinkage: s.

    Attributes:
        tokens: ``(C, LONGEST)``, -1 behind the end.
        weight, bias: ``log p(c | x) = weight x + bias`` up to what is the same for all c;
            ``(C, r)`` and ``(C,)``.

    Raises:
        ValueError: tokens that are none, or sums of nothing: they are damaged.
    """

    def __init__(self, tokens: Tensor, rows: Tensor, scatter: Tensor, shrinkage: float) -> None:
        count = min(len(tokens), len(rows))
        used = tokens[:count].any(-1) & (rows[:count, -1] > 0)
        self.tokens = tokens[:count][used].long() - 1
        sums = rows[:count][used].double()
        r, n = scatter.shape[0], sums[:, -1]
        mu, z = sums[:, :r] / n[:, None], sums[:, r : 2 * r] / n[:, None]
        cov, noise = within(scatter.double(), mu, n, shrinkage)
        m = means(mu, z, n, noise)
        factor, failed = torch.linalg.cholesky_ex(cov)
        if failed.item():
            raise ValueError("the sums of a readout's completions are not positive definite")
        solved = torch.cholesky_solve(m.mT, factor).mT
        self.weight = solved.float()
        self.bias = (n.log() - 0.5 * (m * solved).sum(1)).float()

    def log_probabilities(self, x: Tensor) -> Tensor:
        """``log p(c | x)``: ``(N, r)`` to ``(N, C)``."""
        return (x.double() @ self.weight.double().mT + self.bias.double()).log_softmax(-1).float()


def within(scatter: Tensor, mu: Tensor, n: Tensor, shrinkage: float) -> tuple[Tensor, Tensor]:
    """S ``(r, r)``, and tau r, the squared distance of an example from its mean.

    A share of the variance of all examples (`FEW`) is added to that distance; it stands for it
    where every completion has one example.
    """
    count, free = n.sum(), n.sum() - len(n)
    own = scatter - (mu.mT * n) @ mu if free > 0 else torch.zeros_like(scatter)
    centred = mu - (n @ mu) / count
    between = (n @ centred.square()).sum()
    size = (own.trace() + FEW * (own.trace() + between)) / (free.clamp(min=0) + FEW * count)
    size = torch.maximum(size, 1e-3 * scatter.trace() / count)  # more than sums are rounded by
    cov = (1 - shrinkage) * own / free.clamp(min=1)
    cov.diagonal().add_(shrinkage * size / len(cov))
    return cov, size


def means(mu: Tensor, z: Tensor, n: Tensor, noise: Tensor) -> Tensor:
    """m ``(C, r)``: the means of the examples, and what the completions' words say of them."""
    if len(mu) < 3:
        return mu
    centre = mu.mean(0)
    z = z - z.mean(0)
    gram = z @ z.mT
    size = gram.diagonal().mean()
    if not size > 0:
        return mu
    found, least = mu, torch.inf
    for ridge in RIDGES:
        hat = torch.linalg.solve(gram + ridge * size * torch.eye(len(z)).to(gram), gram).mT
        guess = centre + hat @ (mu - centre)
        # What a mean has to do with its own guess: through the map, and through the centre.
        own = hat.diagonal()[:, None] + 1 / len(mu)
        error = ((guess - mu) / (1 - own)).square().sum(1).mean().item()
        if error < least:
            found, least = guess, error
    kappa = noise / (least - (noise / n).mean()).clamp(min=noise / WORTH)
    return (n[:, None] * mu + kappa * found) / (n[:, None] + kappa)


@dataclasses.dataclass(frozen=True)
class Next:
    """What a memory says comes next at a place.

    Attributes:
        row, place: which row of the batch, and which token of the pass.
        weight: g.
        tokens, chances: the tokens, and ``p(y | x, w)`` of each; a token may stand there twice.
    """

    row: int
    place: int
    weight: float
    tokens: Tensor
    chances: Tensor


def following(read: Read, row: int, known: Completions) -> list[Next]:
    """What comes next in a row of a pass, wherever a completion may have begun.

    A completion may begin behind every token that is familiar (``g > 0``). What was written since
    is compared with the beginnings of all completions; of several beginnings that fit, the earliest
    counts.
    """
    total, new = read.familiar.shape[1], read.key.shape[1]
    first = total - new
    gates = read.familiar[row]
    starts = (gates[max(0, first - LONGEST) :] > 0).nonzero()[:, 0] + max(0, first - LONGEST)
    if not len(starts):
        return []
    chances = known.log_probabilities(read.mean(row, starts))
    tokens = read.tokens[row].tolist()
    found: dict[int, Next] = {}
    for start, logs in zip(starts.tolist(), chances, strict=True):
        alive = torch.ones_like(logs, dtype=torch.bool)
        for step in range(LONGEST):
            place = start + step
            alive = alive & (known.tokens[:, step] >= 0)
            if not alive.any():
                break
            if place >= first and place not in found:
                weight = min(MOST, float(gates[start]))
                left = known.tokens[alive, step]
                found[place] = Next(row, place - first, weight, left, logs[alive].softmax(-1))
            if place + 1 >= total:
                break
            alive = alive & (known.tokens[:, step] == tokens[place + 1])
    return list(found.values())


def mixed(logits: Tensor, nexts: Sequence[Next], length: int) -> Tensor:
    """Logits ``(B, K, V)`` of the last K of ``length`` tokens with ``p(y)`` where it is known."""
    shift = length - logits.shape[1]
    places = [one for one in nexts if one.place >= shift]
    if not places:
        return logits
    result = logits.clone()
    for one in places:
        model = logits[one.row, one.place - shift].float().log_softmax(-1)
        memory = torch.zeros_like(model).index_add_(0, one.tokens, one.chances.to(model))
        made = torch.logaddexp(model + math.log1p(-one.weight), (one.weight * memory).log())
        result[one.row, one.place - shift] = made.to(result)
    return result
