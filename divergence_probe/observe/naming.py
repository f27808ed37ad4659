"""Names in the words of the user's model: of parameters in a loop, of layers that ran forward."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import Tensor, nn

from divergence_probe.observe.capture import DropoutCall, Forwards, NormalizationCall
from divergence_probe.observe.models import KnownModel, Models
from divergence_probe.observe.task import Task
from divergence_probe.observe.tensors import base_of, physical


def named(
    models: Models, tensors: Sequence[Tensor | None], values: Sequence[Tensor]
) -> tuple[KnownModel, list[int]]:
    """The model that parameters belong to, and their positions in it.

    By identity, by what they were cloned from, by value, and last by shape and position.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    whole = models.find_all(present) if len(present) == len(tensors) else None
    if whole is not None:
        return whole
    origins = [
        _origin(models, tensor if tensor is not None else value)
        for tensor, value in zip(tensors, values, strict=True)
    ]
    found = [models.find(origin) or models.stand_in(origin) for origin in origins]
    if not all(found):
        models.discover(origins)
        found = [models.find(origin) or models.stand_in(origin) for origin in origins]
    first = found[0] if found else None
    if first is not None and all(f is not None and f[0] is first[0] for f in found):
        return first[0], [f[1] for f in found if f is not None]
    plain = [physical(tensor)[0] for tensor in values]
    matched = models.match(plain) or models.search_by_value(plain)
    if matched is not None:
        return matched
    bases = [physical(origin)[0] for origin in origins]  # what an outer step would move
    return models.nameless(bases, [""] * len(bases)), list(range(len(bases)))


def _origin(models: Models, tensor: Tensor) -> Tensor:
    if models.find(tensor) is not None or models.stand_in(tensor) is not None:
        return tensor
    base = base_of(tensor)
    return base if base is not None else tensor


class LayerNames:
    """Names of layers in the model they are part of; others are named by class, once."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._unnamed: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._by_statistics: dict[int, tuple[weakref.ref[Tensor], str]] = {}

    def of_statistics(self, running_mean: Tensor | None) -> str | None:
        """The name of the layer that normalises with a running mean, or with what it copies.

        (Where one module runs all layers of a net written by hand, its weights tell them apart; an
        adapted weight that is gone, or one of a copy, no longer does.)
        """
        if running_mean is None:
            return None
        for tensor in (running_mean, self._models.origin_of(running_mean)):
            entry = self._by_statistics.get(id(tensor)) if tensor is not None else None
            if entry is not None and entry[0]() is tensor:
                return entry[1]
        return None

    def _note_statistics(self, call: NormalizationCall, name: str) -> None:
        running_mean = call.statistics() if call.statistics is not None else None
        if running_mean is not None:
            key = id(running_mean)
            self._by_statistics[key] = (
                weakref.ref(running_mean, lambda _: self._by_statistics.pop(key, None)),
                name,
            )

    def give(self, forwards: Forwards, known: KnownModel, task: Task | None) -> None:
        """Give every call its layer name while its module is still alive."""
        if not forwards.normalizations and not forwards.dropouts:
            return
        calls: list[NormalizationCall | DropoutCall] = [
            *forwards.normalizations,
            *forwards.dropouts,
        ]
        for order, call in enumerate(calls):
            if call.name is not None:
                continue
            module = call.module() if call.module is not None else None
            name = None
            if module is not None:
                # A copy keeps its original's name, whatever it is wrapped in. (The model itself has
                # no name in it: what it calls its weights tell apart.)
                name = self._models.copied_name(module) or known.name_of(module) or None
                if name is None and task is not None and task.module_names is not None:
                    name = task.module_names.get(id(module)) or None
            if name is None and isinstance(call, NormalizationCall) and call.weight is not None:
                name = self._name_by_weight(call, known, task)
                if name is not None and call.known_as is None:
                    self._note_statistics(call, name)
            if name is None and isinstance(call, NormalizationCall):
                name = call.known_as
            if name is None and module is not None:
                name = self._unnamed.get(module) or self._name_elsewhere(module, known)
            if name is None and module is not None:
                name = self._unnamed.setdefault(
                    module, f"{type(module).__name__}[{len(self._unnamed)}]"
                )
            call.name = name or f"batch_norm[{order}]"

    def _name_elsewhere(self, module: nn.Module, known: KnownModel) -> str | None:
        """The name of a layer in another model than the one whose gradient was taken.

        (A loss may reach a learned optimizer only, through the weights it made for a model.)
        """
        found = self._models.owner(module) or self._around(module, known)
        if found is None or found[1] in known.module_names.values():
            return None
        return found[1]

    def _around(self, module: nn.Module, known: KnownModel) -> tuple[KnownModel, str] | None:
        """The model that holds a layer as well as what a gradient was taken of: a part (ANIL)."""
        own = list(module.parameters(recurse=False))
        base = [tensor for r in known.parameters if (tensor := r()) is not None]
        if not own or not base or self._models.discover([*base, *own]) is None:
            return None
        return self._models.owner(module)

    def _name_by_weight(
        self, call: NormalizationCall, known: KnownModel, task: Task | None
    ) -> str | None:
        weight = call.weight() if call.weight is not None else None
        if weight is None:
            return None
        position = known.position(weight)
        if position is None and (origin := self._models.origin_of(weight)) is not None:
            position = known.position(origin)
        if position is None and task is not None:
            for index, reference in enumerate(task.fast):
                if reference is not None and reference() is weight:
                    position = index
        if position is None:
            return None
        return known.layout.parameters[position].layer
