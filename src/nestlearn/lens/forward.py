"""Does a forward pass only put its children together, token by token? Read off its bytecode.

A class that nobody registered may hide a memory in its forward pass. It is taken for a plain
composition only if everything that its forward pass names is known to treat each token by itself:
its children and settings, arithmetic, activations, changes of shape. Everything else, a matrix
product or a sum over tokens for instance, is a reason not to know the class.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Collection, Iterator
from types import CodeType
from typing import Any

from torch import Tensor, nn

_ACTIVATIONS = """relu relu_ gelu silu sigmoid tanh elu selu celu leaky_relu softplus mish hardswish
    hardtanh hardsigmoid logsigmoid log_softmax dropout exp log sqrt rsqrt abs neg square pow clamp
    clip sin cos add sub mul div cat stack normalize layer_norm rms_norm relu6"""
_SHAPES = """view reshape flatten unflatten transpose permute contiguous squeeze unsqueeze expand
    expand_as chunk split unbind to type_as dtype device float half bfloat16 size shape dim ndim
    numel mT T requires_grad detach clone"""
_PYTHON = """torch F nn functional math Tensor len range enumerate zip isinstance int float tuple
    list str bool reversed getattr hasattr ValueError RuntimeError TypeError NotImplementedError
    super items values keys append self training config cast Any is_available cuda checkpoint"""
ALLOWED = frozenset(f"{_ACTIVATIONS} {_SHAPES} {_PYTHON}".split())

_LOADS = {
    "LOAD_GLOBAL", "LOAD_NAME", "LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_NAME",
}  # fmt: skip


def foreign_name(module: nn.Module, known: Collection[str] = ()) -> str | None:
    """The first thing in a module's forward pass that is not known to act token by token, or None.

    Names in ``known`` are accepted as well. A module without a forward pass only holds others.

    Example:
        >>> foreign_name(nn.Softmax())
        'softmax'
    """
    if type(module).forward is nn.Module.forward:
        return None
    seen: set[CodeType] = set()
    nested: set[CodeType] = set()  # functions inside these methods: their closure is examined too
    pending = [_code(type(module).forward)]
    while pending:
        code = pending.pop()
        if code is None:
            return "forward"
        if code in seen:
            continue
        seen.add(code)
        for name in (*_names(code), *(() if code in nested else _closure(code))):
            if name in ALLOWED or name in known or _is_own(module, name):
                continue
            own = inspect.getattr_static(type(module), name, None)
            if isinstance(own, property | staticmethod | classmethod):
                return name
            if own is None or name in vars(nn.Module) or not callable(own):
                return name
            pending.append(_code(own))
        inner = [const for const in code.co_consts if isinstance(const, CodeType)]
        nested.update(inner)
        pending += inner
    return None


def uses(module: nn.Module, *names: str) -> bool:
    """Whether the class's own forward pass names one of these."""
    code = _code(type(module).forward)
    return code is not None and not _named_in(code).isdisjoint(names)


@functools.cache
def _named_in(code: CodeType) -> frozenset[str]:
    return frozenset(_names(code))


def _code(function: Any) -> CodeType | None:
    return getattr(inspect.unwrap(function), "__code__", None)


def _names(code: CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in _LOADS and isinstance(instruction.argval, str):
            yield instruction.argval
        elif instruction.opname == "BINARY_OP" and instruction.argrepr in ("@", "@="):
            yield "@"


def _closure(code: CodeType) -> list[str]:
    """What a decorator put around the method; nobody knows what that does."""
    return [name for name in code.co_freevars if name != "__class__"]


def _is_own(module: nn.Module, name: str) -> bool:
    """A child, a parameter or a plain setting of the module."""
    value = vars(module).get(name)
    for kind in ("_modules", "_parameters", "_buffers"):
        value = getattr(module, kind).get(name, value)
    plain = nn.Module | Tensor | int | float | str | bool | tuple
    return isinstance(value, plain)
