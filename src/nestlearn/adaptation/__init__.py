"""Pre-trained models that keep learning: levels for a model that exists, and the memory file.

``nl.adapt`` attaches levels, ``nl.Learner`` learns from a stream, ``*.nlmem`` files keep what was
learned, ``nl.unadapt`` gives the model back.
"""

from nestlearn.adaptation.adapted import Adaptation, adaptation_of
from nestlearn.adaptation.attach import adapt, adapt_to, unadapt
from nestlearn.adaptation.file import Stored, read_memory, write_memory
from nestlearn.adaptation.learned import Learned
from nestlearn.adaptation.learner import Learner
from nestlearn.adaptation.memory import Layout, Memory, Snapshot
from nestlearn.adaptation.sites import Site, find_sites

__all__ = [
    "Adaptation",
    "Layout",
    "Learned",
    "Learner",
    "Memory",
    "Site",
    "Snapshot",
    "Stored",
    "adapt",
    "adapt_to",
    "adaptation_of",
    "find_sites",
    "read_memory",
    "unadapt",
    "write_memory",
]
