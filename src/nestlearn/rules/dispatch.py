"""Which implementation of a rule runs, and why: reference, chunked, triton or fla.

`apply_rule` runs a rule that is linear in its memory over a sequence; `available_paths` says what
this machine can run, for ``nestlearn doctor``.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from nestlearn.rules import reference
from nestlearn.rules.linear import LINEAR_RULES, linear_sequence

FORMS = ("auto", "reference", "chunked", "triton", "fla")
SEQUENCE_RULES = (*LINEAR_RULES, "dgd")


@dataclass(frozen=True)
class Path:
    """One implementation on this machine.

    Attributes:
        name: "reference", "chunked", "compiled", "triton" or "fla".
        available: whether it can run here.
        reason: what it is for, or why it cannot run.
    """

    name: str
    available: bool
    reason: str


@cache
def available_paths() -> tuple[Path, ...]:
    """The implementations this machine has.

    Example:
        >>> [p.name for p in available_paths() if p.available][:2]
        ['reference', 'chunked']
    """
    gpu = torch.cuda.is_available()
    compiler = importlib.util.find_spec("torch._inductor") is not None
    paths = [
        Path("reference", True, "token by token; for tests"),
        Path("chunked", True, "plain torch, all chunks in one batch; runs everywhere"),
        Path(
            "compiled",
            compiler,
            "torch.compile of the chunked path"
            if compiler
            else "this build of torch has no compiler",
        ),
    ]
    no_gpu = "no CUDA device; the chunked path is used"
    if not gpu:
        paths += [Path("triton", False, no_gpu), Path("fla", False, no_gpu)]
        return tuple(paths)
    paths.append(
        Path("triton", False, "this version ships no Triton kernel of its own; chunked is used")
    )
    if importlib.util.find_spec("fla") is None:
        reason = "flash-linear-attention is not installed: pip install flash-linear-attention"
        paths.append(Path("fla", False, reason))
    else:
        paths.append(Path("fla", True, "gated delta rule on CUDA tensors in bf16 or fp16"))
    return tuple(paths)


def choose_form(name: str, M: Tensor, Q: Tensor, gated_delta: bool, form: str = "auto") -> str:
    """Resolve ``form="auto"`` and check an explicit one.

    fla's kernel is chosen for the gated delta rule on half-precision CUDA tensors whose heads are
    at most 256 wide; in everything else the chunked path runs.

    Raises:
        ValueError: the form does not exist, or cannot run this rule here (with the reason).
    """
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; choose one of {', '.join(FORMS)}")
    if form in ("reference", "chunked"):
        return form
    fits = gated_delta and Q.is_cuda and max(M.shape[-2:]) <= 256
    if form == "auto" and not (fits and Q.dtype in (torch.bfloat16, torch.float16)):
        return "chunked"
    paths = {p.name: p for p in available_paths()}
    if form == "auto":
        return "fla" if paths["fla"].available else "chunked"
    if not paths[form].available:
        raise ValueError(f"form={form!r} cannot run here: {paths[form].reason}")
    if not fits:
        raise ValueError(
            f"form={form!r} runs only the gated delta rule (gated=True) on CUDA tensors with heads "
            f"up to 256 wide, not {name!r} on {Q.device}; use form='chunked'"
        )
    return form


def apply_rule(
    name: str,
    M: Tensor,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    eta: Tensor,
    alpha: Tensor,
    decay_eta: Tensor | None = None,
    *,
    gated: bool = False,
    form: str = "auto",
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Write T tokens into a matrix memory and read each after its own write, ``o_t = M_t q_t``.

    Args:
        name: "hebbian" (Eq. 64), "delta" (Eq. 65), "oja" (Eq. 66-67) or "dgd" (Eq. 57, V holds the
            output gradients g, fixed in advance).
        M: ``(B, H, d_out, d_in)``.
        Q, K, V: ``(B, H, T, d)``.
        eta, alpha: ``(B, H, T)``.
        decay_eta: coefficient of the rule's decay term; ``eta`` if None.
        gated: ``decay_eta = alpha * eta`` (gated DeltaNet's placing of the retention).
        form: "reference", "chunked", "fla", "triton" or "auto".
        chunk: tokens per chunk of the chunked form (no effect on the result).

    Returns:
        Outputs ``(B, H, T, d_out)`` and the final memory; all forms agree to rounding.

    Raises:
        ValueError: unknown rule or form, or a form that cannot run here.
    """
    if name not in SEQUENCE_RULES:
        raise ValueError(
            f"unknown rule {name!r}; choose one of {', '.join(SEQUENCE_RULES)} (rules that are not "
            "linear in their memory run inside nestlearn.nn.NeuralMemory)"
        )
    if gated:
        if decay_eta is not None:
            raise ValueError("give either gated=True or decay_eta, not both")
        decay_eta = alpha * eta
    path = choose_form(name, M, Q, name == "delta" and gated, form)
    if path == "fla":
        return _fla(M, Q, K, V, eta, alpha)
    if path == "reference":
        return _reference(name, M, Q, K, V, eta, alpha, decay_eta)
    if name == "dgd":
        name, V = "delta", -V
    return linear_sequence(name, M, Q, K, V, eta, alpha, decay_eta, chunk)


def _reference(
    name: str,
    M: Tensor,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    eta: Tensor,
    alpha: Tensor,
    decay_eta: Tensor | None,
) -> tuple[Tensor, Tensor]:
    step = getattr(reference, name)
    out = []
    for t in range(Q.shape[2]):
        args = (M, K[:, :, t], V[:, :, t], eta[:, :, t], alpha[:, :, t])
        if name != "hebbian" and decay_eta is not None:
            M = step(*args, decay_eta[:, :, t])
        else:
            M = step(*args)
        out.append(reference.read(M, Q[:, :, t]))
    return torch.stack(out, 2), M


def _fla(
    M: Tensor, Q: Tensor, K: Tensor, V: Tensor, eta: Tensor, alpha: Tensor
) -> tuple[Tensor, Tensor]:
    """fla's chunk kernel: tokens before heads, state ``(d_in, d_out)``, retention as logarithm."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k, v, beta = (x.transpose(1, 2).contiguous() for x in (Q, K, V.to(Q.dtype), eta.to(Q.dtype)))
    log_alpha = alpha.float().clamp(min=1e-20).log().transpose(1, 2).contiguous()
    out, state = chunk_gated_delta_rule(
        q,
        k,
        v,
        log_alpha,
        beta,
        scale=1.0,
        initial_state=M.mT.float().contiguous(),
        output_final_state=True,
    )
    return out.transpose(1, 2).to(Q.dtype), state.mT.to(M.dtype)


__all__ = [
    "FORMS",
    "SEQUENCE_RULES",
    "Path",
    "apply_rule",
    "available_paths",
    "choose_form",
]
