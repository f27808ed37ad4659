"""divergence_probe: see why an inner loop diverges, before and after it does.

The package imports neither torch nor anything heavy: public names are loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from divergence_probe.version import __version__

if TYPE_CHECKING:
    from divergence_probe.errors import (
        DivergenceDetected,
        ProbeError,
        RecordingError,
        UsageError,
    )
    from divergence_probe.probe import Probe, attach
    from divergence_probe.record.reader import Recording
    from divergence_probe.testing import assert_no_divergence, diagnose, load

_PUBLIC = {
    "attach": "divergence_probe.probe",
    "Probe": "divergence_probe.probe",
    "assert_no_divergence": "divergence_probe.testing",
    "diagnose": "divergence_probe.testing",
    "load": "divergence_probe.testing",
    "Recording": "divergence_probe.record.reader",
    "DivergenceDetected": "divergence_probe.errors",
    "RecordingError": "divergence_probe.errors",
    "UsageError": "divergence_probe.errors",
    "ProbeError": "divergence_probe.errors",
}

__all__ = [*_PUBLIC, "__version__"]  # noqa: PLE0604 - names of the table above


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    import importlib

    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
