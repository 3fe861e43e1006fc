"""Fig. 4: delta momentum on psi(r, theta) = r^2 + kappa (r - theta + a sin(omega r))^2.

From (-3.5, 2) to the minimum at the origin: the number of steps until psi <= 1e-4 for good (it
stays there for 100 steps more). Two comparisons per landscape: every optimizer with momentum 0.9
and its other settings at their defaults, only its learning rate the best of a grid (for delta
momentum also with delta searched); and every setting on a grid. A best of many lucky curves proves
little, so the chosen setting then starts from 32 points around (-3.5, 2) too: median steps and how
many arrive within the limit. The paper does not state kappa, a and omega; the landscapes below go
from round to stiff and wavy.

    python benchmarks/optimizers_toy.py
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Results, arguments, median, out_path, table

START = (-3.5, 2.0)
TOLERANCE = 1e-4
HOLD = 100  # steps for which psi must stay below the tolerance
LANDSCAPES: dict[str, tuple[float, float, float]] = {  # kappa, a, omega
    "round": (1.0, 1.0, 1.0),
    "curved": (5.0, 1.0, 2.0),
    "stiff": (10.0, 1.0, 2.0),
    "wavy": (20.0, 0.3, 5.0),
    "steep": (50.0, 1.0, 1.0),
}
SHOWN = "stiff"  # the landscape of the picture
RATES = tuple(10 ** (-4 + i / 8) for i in range(33))  # 1e-4 to 1
DECAYS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # `delta` of DeltaMomentum

Shape = tuple[float, float, float]
Make = Callable[[list[torch.Tensor], float], torch.optim.Optimizer]


def psi(r: float, theta: float, shape: Shape) -> float:
    """The landscape's height."""
    kappa, a, omega = shape
    return r * r + kappa * (r - theta + a * math.sin(omega * r)) ** 2


def gradient(r: float, theta: float, shape: Shape) -> tuple[float, float]:
    """Its two partial derivatives."""
    kappa, a, omega = shape
    slope = 2 * kappa * (r - theta + a * math.sin(omega * r))
    return 2 * r + slope * (1 + a * omega * math.cos(omega * r)), -slope


def descend(
    make: Make, lr: float, shape: Shape, limit: int, start: tuple[float, float] = START
) -> tuple[int | None, list[tuple[float, float]]]:
    """(step from which on psi stays at the minimum, or None; the points visited)."""
    point = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = make([point], lr)
    path: list[tuple[float, float]] = []
    reached: int | None = None
    for step in range(limit + 1):
        r, theta = point.tolist()
        path.append((r, theta))
        height = psi(r, theta, shape) if abs(r) + abs(theta) < 1e6 else math.inf
        if not math.isfinite(height):
            return None, path
        if height > TOLERANCE:
            reached = None
        elif reached is None:
            reached = step
        elif step - reached >= HOLD:
            return reached, path
        point.grad = torch.tensor(gradient(r, theta, shape), dtype=torch.float64)
        optimizer.step()
    return None, path


def candidates() -> dict[str, dict[str, list[tuple[str, Make]]]]:
    """Optimizer -> {"plain": one candidate, "tuned": all of its grid}; the rate comes on top."""
    from nestlearn.optim import DeltaMomentum

    sgd, adam = torch.optim.SGD, torch.optim.Adam

    def delta(beta: float, **more: float) -> Make:
        return lambda ps, lr: DeltaMomentum(ps, lr=lr, momentum=beta, **more)

    def momentum(beta: float, nesterov: bool = False) -> Make:
        return lambda ps, lr: sgd(ps, lr=lr, momentum=beta, nesterov=nesterov)

    both = itertools.product(DECAYS[1:], STRENGTHS)
    return {
        "gradient descent": {"plain": [("", lambda ps, lr: sgd(ps, lr=lr))], "tuned": []},
        "momentum": {
            "plain": [("beta=0.9", momentum(0.9))],
            "tuned": [(f"beta={b:g}", momentum(b)) for b in DECAYS],
        },
        "Nesterov": {
            "plain": [("beta=0.9", momentum(0.9, True))],
            "tuned": [(f"beta={b:g}", momentum(b, True)) for b in DECAYS if b],
        },
        "Adam": {
            "plain": [("beta=0.9", lambda ps, lr: adam(ps, lr=lr))],
            "tuned": [
                (f"beta={b:g}", lambda ps, lr, b=b: adam(ps, lr=lr, betas=(b, 0.999)))
                for b in DECAYS
            ],
        },
        "delta momentum": {
            "plain": [("beta=0.9", delta(0.9))],
            "tuned": [(f"beta={b:g} delta={e:g}", delta(b, delta=e)) for b, e in both],
        },
        "delta momentum, delta searched": {
            "plain": [(f"beta=0.9 delta={e:g}", delta(0.9, delta=e)) for e in STRENGTHS],
            "tuned": [],
        },
    }


def search(choices: list[tuple[str, Make]], shape: Shape, limit: int) -> dict[str, Any] | None:
    """The setting and rate with the fewest steps (None: none arrives within the limit)."""
    best: dict[str, Any] | None = None
    for (name, make), lr in itertools.product(choices, RATES):
        # Nothing beyond the best so far has to be followed.
        bound = limit if best is None else best["steps"] - 1 + HOLD
        steps, _ = descend(make, lr, shape, bound)
        if steps is not None:
            best = {"steps": steps, "setting": name, "lr": lr}
    return best


def starts(count: int) -> list[tuple[float, float]]:
    """Points around the start, the same for all."""
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [(START[0] + 0.25 * x, START[1] + 0.25 * y) for x, y in noise.tolist()]


def plot(results: Results, makes: dict[str, dict[str, list[tuple[str, Make]]]], path: Path) -> None:
    """Trajectories over the landscape, and psi over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shape = LANDSCAPES[SHOWN]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6))
    r, theta = torch.meshgrid(
        torch.linspace(-4.5, 3.5, 300), torch.linspace(-5.5, 4.5, 300), indexing="xy"
    )
    kappa, a, omega = shape
    height = r**2 + kappa * (r - theta + a * torch.sin(omega * r)) ** 2
    left.contour(r, theta, height.log(), levels=14, linewidths=0.5, colors="0.75")
    for name, kinds in makes.items():
        row = results.get(f"{SHOWN}/plain/{name}")
        if row is None or row["steps"] is None:
            continue
        steps, points = descend(dict(kinds["plain"])[row["setting"]], row["lr"], shape, 4000)
        line = left.plot(*zip(*points[: (steps or 0) + 1], strict=True), ".-", ms=2, lw=0.9)[0]
        heights = [psi(x, y, shape) for x, y in points]
        right.semilogy(heights, color=line.get_color(), label=f"{name}: {steps} steps")
    left.plot(*START, "ks")
    left.plot(0, 0, "k*", ms=12)
    left.set(xlabel="r", ylabel="theta", xlim=(-4.5, 3.5), ylim=(-5.5, 4.5))
    left.set_title(f"kappa = {kappa:g}, a = {a:g}, omega = {omega:g}; momentum 0.9, best rates")
    right.axhline(TOLERANCE, color="0.6", lw=0.8, ls="--")
    right.set(xlabel="step", ylabel="psi", xlim=(0, 400), ylim=(1e-7, 1e3))
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Search, start from other points, print and store."""
    parser = arguments(__doc__, "optimizers_toy", threads=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    limit = 60 if args.quick else 1000
    around = 2 if args.quick else 32
    landscapes = {k: v for k, v in LANDSCAPES.items() if not args.quick or k == SHOWN}
    results = Results(
        out_path(args),
        question="Does delta momentum reach the minimum of psi in fewer steps than momentum?",
        settings={"start": START, "tolerance": TOLERANCE, "hold": HOLD, "limit": limit,
                  "landscapes": landscapes, "rates": RATES, "decays": DECAYS,
                  "strengths": STRENGTHS, "starts": around},
        threads=args.threads,
        fresh=args.fresh,
    )  # fmt: skip
    makes = candidates()
    for land, kind, name in itertools.product(landscapes, ("plain", "tuned"), makes):
        cell, choices = f"{land}/{kind}/{name}", makes[name][kind]
        if results.done(cell) or not choices:
            continue
        best = search(choices, landscapes[land], limit)
        row: dict[str, Any] = {"landscape": land, "kind": kind, "optimizer": name, "steps": None}
        if best is not None:
            make = dict(choices)[best["setting"]]
            found = [
                descend(make, best["lr"], landscapes[land], limit, s)[0] for s in starts(around)
            ]
            arrived = [steps for steps in found if steps is not None]
            middle = median(limit if s is None else s for s in found)
            row |= best | {"around_median": middle, "around_arrived": len(arrived)}
        results.add(cell, row)
    results.summarise(
        {
            f"{land}/{kind}": {
                r["optimizer"]: r["steps"] for r in results.rows(landscape=land, kind=kind)
            }
            for land in landscapes
            for kind in ("plain", "tuned")
        }
    )
    for kind, title in (("plain", "momentum 0.9, best rate"), ("tuned", "everything on a grid")):
        table(
            f"Steps to the minimum: {title} (median and number arrived from {around} other starts)",
            ("optimizer", *landscapes),
            [
                (name, *(_entry(results.get(f"{land}/{kind}/{name}")) for land in landscapes))
                for name in makes
                if makes[name][kind]
            ],
        )
    if not args.quick:
        plot(results, makes, out_path(args).with_suffix(".png"))


def _entry(row: dict[str, Any] | None) -> str:
    if row is None or row["steps"] is None:
        return "-"
    return f"{row['steps']} ({row['around_median']:.0f}, {row['around_arrived']})"


if __name__ == "__main__":
    main()
