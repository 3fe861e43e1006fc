"""The public names, and that importing nestlearn is enough for the Auto classes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import nestlearn as nl
from nestlearn._lazy import lazy_exports


@pytest.mark.parametrize("package", [nl, nl.nn, nl.optim], ids=lambda package: package.__name__)
def test_public_names_exist(package) -> None:
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert name in dir(package)


def test_a_wrong_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="NoSuchThing"):
        nl.NoSuchThing  # noqa: B018
    get, _ = lazy_exports("nowhere", {"sqrt": "math"})
    assert get("sqrt")(9.0) == 3.0


def test_importing_registers_hope(tmp_path: Path) -> None:
    nl.HopeForCausalLM(nl.HopeConfig.preset("tiny", mixer="attention")).save_pretrained(tmp_path)
    code = (
        "import nestlearn; from transformers import AutoModelForCausalLM; "
        f"print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__name__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(nl.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.stdout.strip() == "HopeForCausalLM", done.stderr
