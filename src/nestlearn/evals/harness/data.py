"""Where the data sets of the evaluations are."""

from __future__ import annotations

import os
from pathlib import Path

from nestlearn.evals.harness.results import ROOT

VARIABLE = "NESTLEARN_DATA"
"""Environment variable that names the folder."""


def data_root() -> Path:
    """Folder of the real data sets (``NESTLEARN_DATA``, else ``../shared/data`` beside a checkout);
    it may not exist."""
    return Path(os.environ.get(VARIABLE, ROOT.parent / "shared" / "data"))


def data_path(*parts: str) -> Path:
    """A file or folder of the data sets.

    Raises:
        ValueError: it is not there; the message says where it was looked for.

    Example:
        >>> data_path("no", "such")
        Traceback (most recent call last):
        ...
        ValueError: no data set 'no/such': set NESTLEARN_DATA (or --data) to the folder that has it
    """
    path = data_root().joinpath(*parts)
    if not path.exists():
        name = "/".join(parts)
        raise ValueError(
            f"no data set {name!r}: set {VARIABLE} (or --data) to the folder that has it"
        )
    return path
