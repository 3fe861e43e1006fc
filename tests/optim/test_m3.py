"""M3 against Alg. 1 worked out by hand, against `torch.optim.Muon`, and how it sorts parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from nestlearn.optim import M3, MultiRate, newton_schulz, orthogonalise, split_parameters

from .models import distance, same_bits, tiny_lm, train


def matrices(model: nn.Module) -> list[Tensor]:
    return [p for _, p in split_parameters(model).matrices]


def svd_schulz(m: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz on the singular values, without a matrix iteration."""
    u, s, vt = torch.linalg.svd(m, full_matrices=False)
    s = s / s.norm()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vt


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3), (2, 3, 5), (1, 4)])
def test_newton_schulz_acts_on_singular_values(shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, dtype=torch.float64)
    torch.testing.assert_close(newton_schulz(x), svd_schulz_batch(x), rtol=1e-9, atol=1e-10)


def svd_schulz_batch(x: Tensor) -> Tensor:
    flat = x.reshape(-1, *x.shape[-2:])
    return torch.stack([svd_schulz(m) for m in flat]).view(x.shape)


def test_newton_schulz_brings_singular_values_near_one() -> None:
    x = torch.randn(64, 256)
    values = torch.linalg.svdvals(newton_schulz(x))
    assert values.min() > 0.65 and values.max() < 1.25


@pytest.mark.parametrize("steps", [1, 3, 5, 7])
@pytest.mark.parametrize("shape", [(3, 9), (9, 4), (2, 3, 6), (40, 600)])
def test_iterating_on_the_gram_matrix_is_the_same_function(steps: int, shape: tuple) -> None:
    x = torch.randn(*shape, dtype=torch.float64)
    torch.testing.assert_close(newton_schulz(x, steps, gram=True), newton_schulz(x, steps))
    # In bfloat16 it is as near to the exact result as the plain iteration, within a factor of 2.
    exact, low = newton_schulz(x, steps), x.bfloat16()
    errors = [(newton_schulz(low, steps, gram=g).double() - exact).norm() for g in (True, False)]
    assert errors[0] < 2 * errors[1] + 1e-2 * exact.norm()


def test_equal_shapes_go_in_one_batch_and_change_nothing() -> None:
    xs = [torch.randn(3, 5), torch.randn(5, 3), torch.randn(200, 150), torch.randn(2, 3, 5)]
    together = orthogonalise(xs, dtype=None)
    for x, y in zip(xs, together, strict=True):
        torch.testing.assert_close(y, newton_schulz(x), rtol=1e-4, atol=1e-5)
    assert orthogonalise([]) == []


def test_newton_schulz_has_a_gradient() -> None:
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: newton_schulz(x, 2), (x,))
    assert torch.isfinite(newton_schulz(torch.zeros(2, 2))).all()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_without_slow_and_second_moment_it_is_muon(nesterov: bool, scale: str) -> None:
    """alpha = 0, V = 1, 100 steps of a real model: the code of torch.optim.Muon, not its
    docstring, whose momentum lacks the factor 1 - momentum."""
    a, b = tiny_lm(dtype=torch.float32), tiny_lm(dtype=torch.float32)
    options = {"lr": 0.01, "weight_decay": 0.1, "nesterov": nesterov}
    muon = torch.optim.Muon(matrices(a), momentum=0.95, adjust_lr_fn=scale, **options)
    m3 = M3(matrices(b), alpha=0, second_moment=False, adjust_lr=scale, ns_gram=False, **options)
    train(a, muon)
    train(b, m3)
    assert same_bits(a, b)
    assert distance(b, tiny_lm(dtype=torch.float32)) > 1e-2


def test_paper_form_by_hand() -> None:
    """Alg. 1 written out for a 1 x 2 matrix, f = 2: NS of a row is the row at a known length."""
    length = 1.0
    for _ in range(5):
        length = 3.4445 * length - 4.7750 * length**3 + 2.0315 * length**5

    def ns(row: list[float]) -> list[float]:
        size = sum(x * x for x in row) ** 0.5
        return [length * x / size for x in row]

    b1, b2, b3, alpha, lr, eps = 0.9, 0.5, 0.7, 0.3, 0.1, 1e-3
    gradients = [[3.0, 4.0], [1.0, -2.0], [0.5, 0.5], [-1.0, 2.0], [0.2, 0.1]]
    w = [1.0, 2.0]
    m1, m2, v = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
    o2 = [0.0, 0.0]
    for t, g in enumerate(gradients):
        if t in (2, 4):  # a new period: the slow memory takes in the two gradients before
            m2 = [m + b3 * (gradients[t - 2][i] + gradients[t - 1][i]) for i, m in enumerate(m2)]
            o2 = ns(m2)
        m1 = [m + b1 * x for m, x in zip(m1, g, strict=True)]
        v = [s + b2 * x * x for s, x in zip(v, g, strict=True)]
        o1 = ns(m1)
        w = [w[i] - lr * (o1[i] + alpha * o2[i]) / (v[i] ** 0.5 + eps) for i in range(2)]
    p = nn.Parameter(torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    optimizer = M3([p], lr=lr, betas=(b1, b2, b3), alpha=alpha, frequency=2, eps=eps,
                   weight_decay=0.0, form="paper", ns_dtype=None)  # fmt: skip
    for g in gradients:
        p.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([w], dtype=torch.float64))


def test_default_form_is_its_equation() -> None:
    """Averages, Nesterov, the second moment over its mean, RMS-matching scale and decay."""
    torch.manual_seed(1)
    w0 = torch.randn(3, 5, dtype=torch.float64)
    gs = torch.randn(8, 3, 5, dtype=torch.float64)
    b1, b2, b3, alpha, lr, eps, f = 0.9, 0.95, 0.8, 0.4, 0.05, 0.5, 3
    w, m1, v = w0.clone(), torch.zeros(3, 5).double(), torch.zeros(3, 5).double()
    m2, o2 = m1.clone(), m1.clone()
    for t, g in enumerate(gs):
        if t and t % f == 0:
            m2 = b3 * m2 + (1 - b3) * gs[t - f : t].sum(0)
            o2 = svd_schulz(m2)
        m1 = b1 * m1 + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        o1 = svd_schulz((1 - b1) * g + b1 * m1)
        corrected = v / (1 - b2 ** (t + 1))
        size = (corrected / corrected.mean()).sqrt() + eps
        w = w - lr * (0.2 * 5**0.5 * (o1 + alpha * o2) / size + 0.1 * w)
    p = nn.Parameter(w0.clone())
    optimizer = M3([p], lr=lr, betas=(b1, b2, b3), alpha=alpha, frequency=f, eps=eps,
                   weight_decay=0.1, ns_dtype=None)  # fmt: skip
    for g in gs:
        p.grad = g
        optimizer.step()
    torch.testing.assert_close(p.detach(), w, rtol=1e-6, atol=1e-7)


def test_the_slow_direction_changes_only_with_its_momentum() -> None:
    p = nn.Parameter(torch.randn(4, 6))
    optimizer = M3([p], frequency=3)
    seen = []
    for _ in range(9):
        p.grad = torch.randn(4, 6)
        optimizer.step()
        seen.append(optimizer.state[p].get("slow_direction", torch.zeros(())).clone())
    assert [s.ndim for s in seen[:3]] == [0, 0, 0]
    assert torch.equal(seen[3], seen[5]) and not torch.equal(seen[5], seen[6])
    assert torch.equal(seen[6], seen[8])


def test_the_step_does_not_see_the_scale_of_the_loss() -> None:
    ps = [nn.Parameter(torch.ones(4, 6, dtype=torch.float64)) for _ in range(2)]
    optimizers = [M3([p], lr=0.1, ns_dtype=None, frequency=2) for p in ps]
    for step in range(5):
        g = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for p, o, scale in zip(ps, optimizers, (1.0, 1024.0), strict=True):
            p.grad = g * scale
            o.step()
    torch.testing.assert_close(ps[0], ps[1], rtol=1e-9, atol=1e-9)


def test_what_is_no_matrix_follows_adamw() -> None:
    a, b = tiny_lm(), tiny_lm()
    m3 = M3(b, lr=1e-2, adamw_weight_decay=0.01, ns_dtype=None)
    kinds = split_parameters(b).kinds()
    rest = [p for n, p in a.named_parameters() if kinds[dict(b.named_parameters())[n]] in (
        "embeddings", "vectors")]  # fmt: skip
    theirs = M3(matrices(a), lr=1e-2, ns_dtype=None)
    adamw = torch.optim.AdamW(rest, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.01)
    train(a, [theirs, adamw], 20)
    train(b, m3, 20)
    assert distance(a, b) < 1e-10
    assert [g["algorithm"] for g in m3.param_groups] == ["m3", "adamw"]


def test_routing() -> None:
    model = nn.ModuleDict({
        "embed": nn.Embedding(5, 4), "conv": nn.Conv1d(4, 4, 3),
        "filters": nn.Conv1d(4, 4, 3, groups=4),
        "linear": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "lm_head": nn.Linear(4, 5, bias=False),
    })  # fmt: skip
    model.register_parameter("heads", nn.Parameter(torch.zeros(2, 3, 3)))
    model.register_parameter("position", nn.Parameter(torch.zeros(7, 4)))
    split = split_parameters(model)
    names = {kind: [n for n, _ in getattr(split, kind)] for kind in split._fields}
    assert names == {
        "matrices": ["heads", "linear.weight"],
        "kernels": ["conv.weight"],
        "embeddings": ["position", "embed.weight", "lm_head.weight"],
        "vectors": ["conv.bias", "filters.weight", "filters.bias", "linear.bias",
                    "norm.weight", "norm.bias"],
    }  # fmt: skip
    other = split_parameters(model, {"lm_head.*": "matrices", "heads": "embeddings"})
    assert [n for n, _ in other.matrices] == ["linear.weight", "lm_head.weight"]
    layouts = {g["layout"]: len(g["params"]) for g in M3(model).param_groups
               if g["algorithm"] == "m3"}  # fmt: skip
    assert layouts == {"flatten": 2, "batch": 1}
    with pytest.raises(ValueError, match="no trainable parameter is called nothing"):
        split_parameters(model, {"nothing": "vectors"})
    with pytest.raises(ValueError, match="a vector cannot be in matrices"):
        split_parameters(model, {"norm.weight": "matrices"})
    with pytest.raises(ValueError, match="must be one of matrices"):
        split_parameters(model, {"norm.weight": "matrix"})
    assert "matrices: 2 tensors" in repr(split)


def test_tied_heads_and_hope_are_sorted() -> None:
    import nestlearn as nl

    model = nl.HopeForCausalLM(nl.HopeConfig.preset("tiny", cms_periods=[1, 4]))
    split = split_parameters(model)
    assert [n for n, _ in split.embeddings] == ["model.embed_tokens.weight"]
    assert all(p.ndim < 2 or "norm" in n or "gain" in n or "conv" in n or 1 in p.shape[-2:]
               or "logit" in n or "bias" in n for n, p in split.vectors)  # fmt: skip
    assert any(".cms." in n for n, _ in split.matrices)
    optimizer = MultiRate(
        nl.optim.level_groups(model, lr=1e-3), inner=lambda groups: M3(groups, model=model)
    )
    ids = torch.randint(0, 50, (2, 17))
    for _ in range(5):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert optimizer.levels["every 4"].updates == 1
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_batches_of_matrices_and_kernels() -> None:
    """A (heads, m, n) parameter is as many matrices; a kernel is one matrix (out, rest)."""
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(2, 3, 5, dtype=torch.float64))
    alone = [nn.Parameter(stack[i].detach().clone()) for i in range(2)]
    g = torch.randn(2, 3, 5, dtype=torch.float64)
    group = {"params": [stack], "algorithm": "m3", "layout": "batch"}
    options = {"second_moment": False, "ns_dtype": None}
    M3_stack, M3_alone = M3([group], **options), M3(alone, **options)
    stack.grad, alone[0].grad, alone[1].grad = g, g[0].clone(), g[1].clone()
    M3_stack.step(), M3_alone.step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in alone]))
    kernel = nn.Parameter(torch.randn(4, 2, 3, dtype=torch.float64))
    flat = nn.Parameter(kernel.detach().reshape(4, 6).clone())
    kernel.grad = torch.randn(4, 2, 3, dtype=torch.float64)
    flat.grad = kernel.grad.reshape(4, 6)
    M3([kernel], ns_dtype=None).step(), M3([flat], ns_dtype=None).step()
    torch.testing.assert_close(kernel.detach().reshape(4, 6), flat.detach())


def test_memory_layout_does_not_matter() -> None:
    """Channels-last kernels and transposed views are updated in place like any other."""
    a = nn.Parameter(torch.randn(4, 3, 2, 2, dtype=torch.float64))
    b = nn.Parameter(a.detach().clone().contiguous(memory_format=torch.channels_last))
    for p in (a, b):
        optimizer = M3([p], lr=0.1, frequency=2, ns_dtype=None)
        for step in range(4):
            torch.manual_seed(step)
            p.grad = torch.empty_like(p).copy_(torch.randn(4, 3, 2, 2))
            optimizer.step()
    torch.testing.assert_close(a.detach(), b.detach())


@pytest.mark.parametrize(("options", "message"), [
    ({"betas": (0.9, 1.0, 0.9)}, "b2 must be in"),
    ({"betas": (0.9, 0.9)}, r"betas must be \(b1, b2, b3\)"),
    ({"frequency": 0}, "frequency must be an integer"),
    ({"alpha": -1.0}, "alpha must be in"),
    ({"form": "paper", "nesterov": True}, "no Nesterov"),
    ({"form": "x"}, "form must be one of"),
    ({"adjust_lr": "x"}, "adjust_lr must be one of"),
    ({"ns_steps": 0}, "ns_steps must be"),
    ({"lr": -1.0}, "lr must be in"),
    ({"capturable": True}, "no capturable step"),
    ({"differentiable": True}, "no differentiable step"),
])  # fmt: skip
def test_bad_values_raise(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        M3([nn.Parameter(torch.zeros(2, 2))], **options)


def test_a_vector_cannot_be_in_an_m3_group() -> None:
    with pytest.raises(ValueError, match="algorithm='adamw'"):
        M3([{"params": [nn.Parameter(torch.zeros(3))], "algorithm": "m3"}])


def test_state_of_the_other_kind_is_refused() -> None:
    a, b = tiny_lm(), tiny_lm()
    first = M3(a)
    train(a, first, 2)
    second = M3([{"params": list(b.named_parameters()), "algorithm": "adamw", "betas": (0.9, 0.9)}])
    with pytest.raises(ValueError, match="algorithm='m3'"):
        second.load_state_dict(copy.deepcopy(first.state_dict()))
