"""What happens to a language model when it skips the FFN neurons that a domain does not need."""

from __future__ import annotations

import importlib
from typing import Any

from spath_eval.contracts import (
    CONTRACT_VERSION,
    FFN,
    Architecture,
    Budget,
    Context,
    Domain,
    LoadRequest,
    ReferenceShape,
    Report,
    Strategy,
    UsageError,
)
from spath_eval.hookspecs import hookimpl

__version__ = "0.1.0"

_LAZY = {
    "Mask": "spath_eval.masks",
    "remove_experts": "spath_eval.masks",
    "remove_lowest": "spath_eval.masks",
    "Profile": "spath_eval.profiling",
    "Site": "spath_eval.sites",
    "SpathLM": "spath_eval.quality.scorer",
    "run": "spath_eval.session",
}
"""Public names whose modules import torch, loaded at first use."""

__all__ = [
    "CONTRACT_VERSION",
    "FFN",
    "Architecture",
    "Budget",
    "Context",
    "Domain",
    "LoadRequest",
    "ReferenceShape",
    "Report",
    "Strategy",
    "UsageError",
    "hookimpl",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
