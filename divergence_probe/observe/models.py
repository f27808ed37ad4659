"""The user's models: stable names for parameters and modules, by identity."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from divergence_probe.observe.at_hand import all_same, are_same, worth_a_wait
from divergence_probe.observe.modules_alive import ModulesAlive
from divergence_probe.observe.tensors import TensorSet, are, is_fresh
from divergence_probe.record.schema import CONTAINERS, NAMELESS, Layout, ParameterInfo

#: Wrappers that prefix every name without being part of the user's model.
_WRAPPERS = frozenset(
    {"DataParallel", "DistributedDataParallel", "OptimizedModule", "FullyShardedDataParallel"}
)

#: Tells models of the same structure apart.
_SERIALS = itertools.count()

_MATCHES_TRIED = 8


def unwrapped(module: nn.Module) -> nn.Module:
    """The user's own module inside DataParallel, DDP or a compiled wrapper."""
    while type(module).__name__ in _WRAPPERS:
        inner = getattr(module, "module", None) or getattr(module, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            break
        module = inner
    return module


def is_compiled(model: nn.Module) -> bool:
    """Whether a module below runs a compiled call (or a forward) stored on the instance.

    Such a call is bound to the instance it was made from, and copied with it.
    """
    return any(
        module.__dict__.get("_compiled_call_impl") is not None or "forward" in module.__dict__
        for module in model.modules()
    )


def describe(name: str, tensor: Tensor, kind: str = "") -> ParameterInfo:
    """The parts of a parameter that are recorded once."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return ParameterInfo(name, tuple(tensor.shape), dtype, str(tensor.device), kind)


class KnownModel:
    """One model of the user: its layout, and its tensors and modules by identity.

    Holds no strong reference to the model or to any of its tensors.
    """

    def __init__(self, model: nn.Module | None, layout: Layout, tensors: Sequence[Tensor]) -> None:
        self.layout = layout
        self.serial = next(_SERIALS)
        self.model = weakref.ref(model) if model is not None else None
        self.parameters = [weakref.ref(tensor) for tensor in tensors]
        self.positions = {p.name: i for i, p in enumerate(layout.parameters)}
        self.module_names: dict[int, str] = {}
        self.buffer_ids: set[int] = set()
        if model is not None:
            self.refresh(model)

    def refresh(self, model: nn.Module) -> None:
        """Note modules and buffers as they are now (users add and replace them)."""
        self.module_names = {id(module): name for name, module in model.named_modules()}
        self.buffer_ids = {id(buffer) for buffer in model.buffers()}

    def name_of(self, module: nn.Module) -> str | None:
        """The dotted name of one of its modules, or None."""
        return self.module_names.get(id(module))

    def position(self, tensor: Tensor) -> int | None:
        """Index of one of its parameters, by identity, or None."""
        for index, reference in enumerate(self.parameters):
            if reference() is tensor:
                return index
        return None


class Models:
    """Every model met so far."""

    def __init__(self) -> None:
        self.layouts: list[Layout] = []
        self._by_model: weakref.WeakKeyDictionary[nn.Module, KnownModel] = (
            weakref.WeakKeyDictionary()
        )
        self._at_hand: list[KnownModel] = []  # the same, for what every normalisation asks
        self._by_parameter: dict[int, tuple[weakref.ref[Tensor], KnownModel, int]] = {}
        self._by_shape: dict[tuple[object, ...], KnownModel] = {}
        self._beside: dict[int, list[KnownModel]] = {}  # others of a layout, nameless, too
        self._others = TensorSet()
        self._searched: set[int] = set()
        self._alive = ModulesAlive()
        self._copies: dict[int, tuple[weakref.ref[Tensor], weakref.ref[Tensor]]] = {}
        self._rebuilt = TensorSet()
        self._copied_modules: dict[int, tuple[weakref.ref[nn.Module], str]] = {}
        self._begun = TensorSet()
        self._alike: list[list[weakref.ref[Tensor]]] = []
        self._stand_ins: dict[int, tuple[weakref.ref[Tensor], KnownModel, int]] = {}

    def register(self, model: nn.Module) -> KnownModel:
        """The record of ``model``; equal structures share one layout."""
        model = unwrapped(model)
        known = self._by_model.get(model)
        parameters = dict(model.named_parameters())
        if known is not None and len(known.parameters) == len(parameters):
            for (_, parameter), reference in zip(parameters.items(), known.parameters, strict=True):
                if reference() is not parameter:
                    break
            else:
                return known
        layout = self._layout(type(model).__name__, _infos(model, list(parameters.values())))
        known = KnownModel(model, layout, list(parameters.values()))
        self._by_model[model] = known
        self._at_hand = list(self._by_model.values())
        for index, parameter in enumerate(parameters.values()):
            self._by_parameter[id(parameter)] = (weakref.ref(parameter), known, index)
        return known

    def nameless(self, tensors: Sequence[Tensor], uses: Sequence[str]) -> KnownModel:
        """A layout for tensors no module owns.

        Their names are those of the functional model's skeleton that has such parameters; without
        one, position, shape and what uses them.
        """
        key = tuple((tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors)
        known = self._by_shape.get(key)
        if known is None:
            skeleton = self._skeleton(tensors)
            if skeleton is not None:
                layout = self._layout(type(skeleton).__name__, _infos(skeleton, tensors))
            else:
                infos = tuple(
                    describe(_positional_name(index, tensor, use), tensor, use)
                    for index, (tensor, use) in enumerate(zip(tensors, uses, strict=True))
                )
                layout = self._layout("", infos)
            known = KnownModel(skeleton, layout, tensors)
            self._by_shape[key] = known
        if any(reference() is None for reference in known.parameters):
            known.parameters = [weakref.ref(tensor) for tensor in tensors]
        return known

    def note_beside(self, tensors: Iterable[Tensor]) -> None:
        """Note leaves that a gradient reached together with the weights that it moves."""
        for tensor in tensors:
            self._others.add(tensor)

    def are_beside(self, known: KnownModel, tensors: Sequence[Tensor]) -> bool:
        """Whether nameless tensors are not those of a model of their shapes, but beside them."""
        if known.model is not None or not self._others:
            return False
        if any(known.position(tensor) is not None for tensor in tensors):
            return False
        return all(tensor in self._others for tensor in tensors)

    def beside(self, known: KnownModel, tensors: Sequence[Tensor]) -> KnownModel:
        """A model alike ``known``, for nameless tensors that live and move beside its own.

        They take the place of such tensors that are gone.
        """
        alike = self._beside.setdefault(known.layout.index, [])
        for other in alike:
            if any(reference() is None for reference in other.parameters):
                other.parameters = [weakref.ref(tensor) for tensor in tensors]
                break
        else:
            other = KnownModel(None, known.layout, tensors)
            alike.append(other)
        for index, tensor in enumerate(tensors):
            self._by_parameter[id(tensor)] = (weakref.ref(tensor), other, index)
        return other

    def named(self, parameters: Mapping[str, Tensor]) -> KnownModel:
        """A layout for parameters under the names the user gives them."""
        key = ("named", *((name, tuple(tensor.shape)) for name, tensor in parameters.items()))
        known = self._by_shape.get(key)
        if known is None:
            infos = tuple(describe(name, tensor) for name, tensor in parameters.items())
            known = KnownModel(None, self._layout("", infos), list(parameters.values()))
            self._by_shape[key] = known
        return known

    def find(self, tensor: Tensor) -> tuple[KnownModel, int] | None:
        """The model that owns ``tensor`` and the tensor's index in it, by identity."""
        entry = self._by_parameter.get(id(tensor))
        if entry is None or entry[0]() is not tensor:
            return None
        return entry[1], entry[2]

    def find_all(self, tensors: Sequence[Tensor]) -> tuple[KnownModel, list[int]] | None:
        """The one model that owns all of ``tensors``, and their positions in it, by identity."""
        found = self.find(tensors[0]) if tensors else None
        if found is None:
            return None
        owner = found[0]
        if are(owner.parameters, tensors):
            return owner, list(range(len(tensors)))
        places = [self.find(tensor) for tensor in tensors]
        positions = [place[1] for place in places if place is not None and place[0] is owner]
        return (owner, positions) if len(positions) == len(tensors) else None

    def owner(self, module: nn.Module) -> tuple[KnownModel, str] | None:
        """The known model that contains ``module``, and the module's name in it."""
        for known in list(self._by_model.values()):
            name = known.name_of(module)
            if name is not None:
                return known, name
        return None

    def match(
        self, tensors: Sequence[Tensor], among: Iterable[KnownModel] | None = None
    ) -> tuple[KnownModel, list[int]] | None:
        """A known model with parameters of the same shapes and values, and their positions.

        For fast weights that were cloned and detached, which identity cannot name. Compared on the
        CPU only: elsewhere it would wait for the device.
        """
        if not all(map(worth_a_wait, tensors)):
            return None
        if all(is_fresh(tensor) for tensor in tensors):
            return None  # zeros are equal to any other zeros
        for known in list(self._by_model.values() if among is None else among):
            own = [reference() for reference in known.parameters]
            positions: list[int] = []
            for tensor in tensors:
                position = next(
                    (
                        i
                        for i, p in enumerate(own)
                        if p is not None
                        and i not in positions
                        and are_same(p, tensor, worth_a_wait)
                    ),
                    None,
                )
                if position is None:
                    break
                positions.append(position)
            else:
                return known, positions
        return None

    def note_copy(self, copy: Tensor, origin: Tensor) -> None:
        """``copy`` was deep-copied from ``origin``."""
        key = id(copy)
        self._copies[key] = (
            weakref.ref(copy, lambda _: self._copies.pop(key, None)),
            weakref.ref(origin),
        )

    def note_rebuilt(self, tensor: Tensor) -> None:
        """``tensor`` was unpickled: its model may be a copy of another one."""
        self._rebuilt.add(tensor)

    def _look_for_origin(self, tensor: Tensor) -> None:
        """Look, once, for what an unpickled parameter's model is a copy of.

        That is a model of the same class with the same values throughout, and no copy itself.
        """
        self._rebuilt.discard(tensor)
        modules = self._modules()
        owners = [module for module in modules if _owns(module, {id(tensor)})]
        copy = max(owners, key=lambda module: len(list(module.modules())), default=None)
        own = dict(copy.named_parameters()) if copy is not None else {}
        if copy is None or not all(map(worth_a_wait, own.values())):
            return
        for parameter in own.values():
            self._rebuilt.discard(parameter)
        if all(map(is_fresh, own.values())):
            return  # zeros are equal to any other zeros
        kind = type(copy)
        for origin in (module for module in modules if type(module) is kind and module is not copy):
            theirs = dict(origin.named_parameters())
            if theirs.keys() != own.keys():
                continue
            if any(t in self._rebuilt or id(t) in self._copies for t in theirs.values()):
                continue
            if all_same(list(own.values()), list(theirs.values()), worth_a_wait):
                for name, parameter in own.items():
                    self.note_copy(parameter, theirs[name])
                self.note_module_copy(copy, origin)
                return

    def note_module_copy(self, copy: nn.Module, origin: nn.Module) -> None:
        """``copy`` is a deep copy of ``origin``: its modules keep the names they have there.

        (A model that copies itself may copy its parts one by one.)
        """
        owner = self.owner(origin)
        for name, module in copy.named_modules(prefix=owner[1] if owner is not None else ""):
            key = id(module)
            self._copied_modules[key] = (
                weakref.ref(module, lambda _, key=key: self._copied_modules.pop(key, None)),  # type: ignore[misc]
                name,
            )

    def copied_name(self, module: nn.Module) -> str | None:
        """The name a deep-copied module has in its model, or None."""
        entry = self._copied_modules.get(id(module))
        return entry[1] if entry is not None and entry[0]() is module else None

    def origin_of(self, tensor: Tensor) -> Tensor | None:
        """What ``tensor`` was deep-copied from (or pickled), if it is a copy."""
        if self._rebuilt and tensor in self._rebuilt:
            self._look_for_origin(tensor)
        entry = self._copies.get(id(tensor))
        return entry[1]() if entry is not None and entry[0]() is tensor else None

    def origins_of(self, tensors: Sequence[Tensor]) -> list[Tensor] | None:
        """What each of ``tensors`` was deep-copied from; None where one is no copy."""
        if not self._copies and not self._rebuilt:
            return None
        origins = [self.origin_of(tensor) for tensor in tensors]
        present = [origin for origin in origins if origin is not None]
        return present if len(present) == len(origins) else None

    def note(self, tensor: Tensor, known: KnownModel, position: int) -> None:
        """``tensor`` stands in for a parameter of a known model (``functional_call``)."""
        key = id(tensor)
        if self.find(tensor) is None:
            self._stand_ins[key] = (
                weakref.ref(tensor, lambda _: self._stand_ins.pop(key, None)),
                known,
                position,
            )

    def note_begun(self, tensor: Tensor) -> None:
        """A task began from ``tensor`` and made others of it: whatever it is a copy of, a base."""
        self._begun.add(tensor)

    def begun(self, tensor: Tensor) -> bool:
        """Whether tasks began from ``tensor``."""
        return tensor in self._begun

    def note_begun_alike(self, known: KnownModel, values: Sequence[Tensor | None]) -> None:
        """A task began with ``values``: if ``known``'s own, from clones that show no origin.

        What it is a base of may as well be a copy of ``known`` that has not moved yet, or what
        ``known`` is a copy of. Until one of them moves each counts as the base; see
        :meth:`note_moved`. What is made later (the clones of the next task) is none.
        """
        own = [tensor for r in known.parameters if (tensor := r()) is not None]
        if all(map(self.begun, own)) or not all(map(worth_a_wait, own)):
            return
        if all(map(is_fresh, own)) or not all_same(own, values, worth_a_wait):
            return  # (with zeros begin others, too, that have nothing to do with it)
        alike = [t for model in list(self._by_model.values()) for t in _equals(model, own)]
        ids = set(map(id, own))
        for copied, origin in list(self._copies.values()):
            copy, source = copied(), origin()
            if copy is not None and source is not None and id(source) in ids:
                alike += [copy] if are_same(copy, source, worth_a_wait) else []
        fresh = [tensor for tensor in (*own, *alike) if not self.begun(tensor)]
        for tensor in fresh:
            self.note_begun(tensor)
        self._alike.append([weakref.ref(tensor) for tensor in fresh])

    def note_moved(self, tensors: Iterable[Tensor]) -> list[KnownModel]:
        """An outer step moved ``tensors``: what was merely equal to them is no base.

        Returns:
            The models that were taken for one.
        """
        moved = set(map(id, tensors))
        mistaken: list[Tensor] = []
        for group in self._alike:
            members = [tensor for r in group if (tensor := r()) is not None]
            if any(id(tensor) in moved for tensor in members):
                mistaken += [tensor for tensor in members if id(tensor) not in moved]
                group.clear()
        self._alike = [group for group in self._alike if group]
        for tensor in mistaken:
            self._begun.discard(tensor)
        found = [place[0] for tensor in mistaken if (place := self.find(tensor)) is not None]
        return list(dict.fromkeys(found))

    def stand_in(self, tensor: Tensor) -> tuple[KnownModel, int] | None:
        """The parameter ``tensor`` stood in for, if it did."""
        entry = self._stand_ins.get(id(tensor))
        return (entry[1], entry[2]) if entry is not None and entry[0]() is tensor else None

    def is_base_buffer(self, buffer: Tensor) -> bool:
        """Whether ``buffer`` is a known model's own."""
        key = id(buffer)
        for known in self._at_hand:
            if key in known.buffer_ids and known.model is not None and known.model() is not None:
                return True
        return False

    def discover(self, tensors: Iterable[Tensor]) -> KnownModel | None:
        """Search the interpreter for the smallest module that owns all of ``tensors``.

        Only for tensors never searched for before, and not for ever.
        """
        wanted = {id(tensor) for tensor in tensors}
        if not wanted or wanted <= self._searched:
            return None
        self._searched |= wanted
        candidates = [m for m in self._modules() if _owns(m, wanted)]
        if not candidates:
            return None
        # A list of parameters is part of a model: whose it is says more than its bare numbers.
        return self.register(
            min(candidates, key=lambda m: (_is_container(m), len(list(m.parameters()))))
        )

    def _modules(self) -> list[nn.Module]:
        """Every module alive that is the user's own."""
        return [m for m in self._alive.find() if type(m).__name__ not in _WRAPPERS]

    def search_by_value(self, tensors: Sequence[Tensor]) -> tuple[KnownModel, list[int]] | None:
        """As :meth:`match`, among every module alive: for clones of a model not met yet."""
        shapes = {tensor.shape for tensor in tensors}
        candidates = sorted(
            (m for m in self._modules() if shapes <= {p.shape for p in _parameters(m)}),
            key=lambda m: (_is_container(m), len(_parameters(m))),
        )
        # (all of them: copies of one model are equal, and any may be the one that is meant)
        registered = [self.register(module) for module in candidates[:_MATCHES_TRIED]]
        return self.match(tensors, registered)

    def _skeleton(self, tensors: Sequence[Tensor]) -> nn.Module | None:
        """The innermost module on the meta device with parameters of these shapes in this order.

        ``functorch.make_functional`` calls such a copy, and so does who follows torch's own advice
        to give ``functional_call`` a model that holds no values.
        """
        shapes = [tensor.shape for tensor in tensors]
        found = [
            module
            for module in self._modules()
            if (own := _parameters(module))
            and all(p.device.type == "meta" for p in own)
            and [p.shape for p in own] == shapes
        ]
        return min(found, key=lambda m: len(list(m.modules())), default=None)

    def _layout(self, model: str, infos: tuple[ParameterInfo, ...]) -> Layout:
        for layout in self.layouts:
            if layout.model == model and layout.parameters == infos:
                return layout
        layout = Layout(len(self.layouts), model, infos)
        self.layouts.append(layout)
        return layout


def base_among(
    bases: Iterable[KnownModel], tensors: Sequence[Tensor | None]
) -> tuple[KnownModel, dict[int, int]] | None:
    """Which of ``bases`` most of ``tensors`` belong to, by identity.

    Others may be among them: an outer optimizer often moves learned step sizes along.

    Returns:
        The base and, for each index into ``tensors`` that is the base's, its position there.
    """
    best: tuple[KnownModel, dict[int, int]] | None = None
    for known in bases:
        own = {id(t): i for i, r in enumerate(known.parameters) if (t := r()) is not None}
        places = {i: own[id(t)] for i, t in enumerate(tensors) if id(t) in own}
        if places and (best is None or len(places) > len(best[1])):
            best = known, places
    return best


def _infos(module: nn.Module, values: Sequence[Tensor]) -> tuple[ParameterInfo, ...]:
    """Names and kinds of a module's parameters, with the shapes and devices of ``values``."""
    kinds = {name: type(part).__name__ for name, part in module.named_modules()}
    names = [name for name, _ in module.named_parameters()]
    return tuple(
        describe(name, value, kinds.get(name.rpartition(".")[0], ""))
        for name, value in zip(names, values, strict=True)
    )


def _equals(known: KnownModel, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The parameters of a model that has as many as ``tensors``, with the same values."""
    own = [tensor for r in known.parameters if (tensor := r()) is not None]
    return own if all_same(own, tensors, worth_a_wait) else []


def _parameters(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if isinstance(p, Tensor)]


def _is_container(module: nn.Module) -> bool:
    return type(module).__name__ in CONTAINERS


def _owns(module: nn.Module, wanted: set[int]) -> bool:
    return wanted <= {id(p) for p in _parameters(module)}


def _positional_name(index: int, tensor: Tensor, use: str) -> str:
    shape = "x".join(str(size) for size in tensor.shape) or "scalar"
    return f"{NAMELESS}{index}] {shape} {use}".rstrip()


def fast_module_names(model: nn.Module) -> dict[int, str]:
    """Module identity to dotted name, for a library's own copy of the user's model."""
    return {id(module): name for name, module in model.named_modules()}
