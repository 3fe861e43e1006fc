"""Names that are imported when they are first used (PEP 562), so that importing costs nothing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_exports(
    package: str, exports: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package whose public names live in other modules.

    Args:
        package: the package's ``__name__``.
        exports: public name -> module that defines it; a module that ends in the public name
            itself (``"nn": "nestlearn.nn"``) stands for the module.

    Example:
        >>> get, names = lazy_exports("math_names", {"sqrt": "math"})
        >>> get("sqrt")(4.0)
        2.0
    """

    def __getattr__(name: str) -> Any:
        if name not in exports:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(exports[name])
        value = module if exports[name] == f"{package}.{name}" else getattr(module, name)
        if package in sys.modules:
            setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:
        found = vars(sys.modules[package]) if package in sys.modules else {}
        return sorted({*found, *exports})

    return __getattr__, __dir__
