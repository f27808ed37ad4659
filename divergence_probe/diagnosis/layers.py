"""How many layers were watched: each counted once, under however many names it was met."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from divergence_probe.record.schema import (
    CONTAINERS,
    MISSING,
    NAMELESS,
    Block,
    Flags,
    ParameterInfo,
)


class WatchedLayers:
    """Which parameters of every layout were ever measured."""

    def __init__(self) -> None:
        self._parameters: dict[tuple[str, tuple[ParameterInfo, ...]], Flags] = {}

    def feed(self, block: Block) -> None:
        """Take one block."""
        layout = block.layout
        measured = (block.parameters["norm_before"] != MISSING).any(0)
        known = self._parameters.setdefault((layout.model, layout.parameters), measured)
        np.logical_or(known, measured, out=known)

    def count(self) -> int:
        """The layers that own them.

        A model may be met as a whole, as a part of another one, and as tensors without a name. What
        a larger layout holds already, in the same order and shapes and under the same names (or
        none), is not counted again.
        """
        met = [_Met(model, _chosen(own, flags)) for (model, own), flags in self._parameters.items()]
        counted: list[_Met] = []
        for one in sorted(met, key=lambda one: (one.is_nameless, -len(one.parameters))):
            if not any(other.holds(one) for other in counted):
                counted.append(one)
        owned = {p.layer for one in counted for p in one.parameters if not _is_loose(p)}
        loose = [[p for p in one.parameters if _is_loose(p)] for one in counted]
        return len(owned) + sum(map(_layers_of_tensors, loose))


class _Met:
    """What was measured of one layout."""

    def __init__(self, model: str, parameters: Sequence[ParameterInfo]) -> None:
        self.model = model
        self.parameters = parameters
        self.is_nameless = all(p.name.startswith(NAMELESS) for p in parameters)

    def holds(self, part: _Met) -> bool:
        """Whether all parameters of ``part`` are among its own, in the same order."""
        alike = self.model == part.model or not (self.model and part.model)
        rest = iter(self.parameters)
        return all(any(_is_same(other, own, alike) for other in rest) for own in part.parameters)


def _chosen(parameters: Sequence[ParameterInfo], flags: Flags) -> list[ParameterInfo]:
    return [p for p, measured in zip(parameters, flags.tolist(), strict=True) if measured]


def _is_loose(parameter: ParameterInfo) -> bool:
    """Whether no module is the parameter's layer."""
    return parameter.kind in CONTAINERS or "." not in parameter.name or _is_numbered(parameter)


def _is_numbered(parameter: ParameterInfo) -> bool:
    return parameter.name.startswith(NAMELESS)


def _is_same(whole: ParameterInfo, part: ParameterInfo, alike: bool) -> bool:
    """Whether two names may be one parameter's; equal ones in models that are ``alike`` are."""
    if whole.shape != part.shape:
        return False
    named = (alike and whole.name == part.name) or whole.name.endswith(f".{part.name}")
    return named or _is_numbered(part)


def _layers_of_tensors(parameters: Sequence[ParameterInfo]) -> int:
    """Layers of tensors in a mere list: a weight, and the bias of as many outputs after it."""
    layers, weight = 0, None
    for parameter in parameters:
        bias = weight is not None and parameter.shape == weight.shape[:1]
        layers += not bias
        weight = None if bias else parameter
    return layers
