"""Decides when to look for the first bad operation, gives it its line, and reports it once.

When to look: where a loss about to be differentiated is visibly not finite; once at every line
where a gradient is taken through an operation whose derivative can be infinite; and for some calls
after a fault, while the checking mode is armed.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from divergence_probe.observe.forensics import backward, forward
from divergence_probe.observe.forensics.checking_mode import CheckingMode, Note, sequence_number
from divergence_probe.observe.forensics.fault import Fault, locate
from divergence_probe.observe.forensics.graph import Graph, Range, finite
from divergence_probe.observe.forensics.windows import (
    FORWARD,
    GRADIENT,
    UPDATE,
    Place,
    Window,
    Windows,
)
from divergence_probe.observe.tensors import physical

if TYPE_CHECKING:
    from divergence_probe.observe.session import Session, Task

_MOST_LOOKS = 24
_ARMED_CALLS = 48
_MOST_FAULTS = 8
_WAITS = 40

_INVESTIGATORS: weakref.WeakKeyDictionary[Session, Investigator] = weakref.WeakKeyDictionary()


def investigator_of(session: Session) -> Investigator:
    """The one investigator of a session."""
    found = _INVESTIGATORS.get(session)
    if found is None:
        found = _INVESTIGATORS[session] = Investigator(session)
    return found


@dataclass
class _Case(threading.local):
    """What one thread is in the middle of."""

    windows: Windows = field(default_factory=Windows)
    mode: CheckingMode | None = None
    notes: list[Note] = field(default_factory=list)
    armed: int = 0


class Investigator:
    """Told of every gradient call, before and after; see the module's docstring."""

    def __init__(self, session: Session) -> None:
        self._session = weakref.proxy(session)
        self._case = _Case()
        self._gradient: Callable[..., Any] = torch.autograd.grad
        self._waiting: list[Fault] = []
        self._known: set[tuple[object, ...]] = set()
        self._risky: dict[int, bool] = {}
        self._suspecting = False
        self._looks = 0
        self._off = False
        session.closing.append(self.close)

    # -- around a gradient call -------------------------------------------------------------------

    def before(
        self,
        loss: Tensor | None,
        inputs: Sequence[Tensor],
        task: Task | None = None,
        names: Callable[[], Sequence[str]] | None = None,
    ) -> None:
        """A gradient of ``loss`` with respect to ``inputs`` is about to be taken.

        Args:
            loss: the user's own, its graph alive.
            inputs: likewise.
            task: its task, where it is known already.
            names: gives the inputs' parameter names; called only after a fault.
        """
        if self._off:
            return
        case = self._case
        before = sequence_number()
        window = Window(self._session.sites.here(), _made_by(inputs), before)
        case.windows.open(window)
        if case.mode is not None:
            case.notes = case.mode.take_off()
        task = task or self._task_of(inputs)
        if task is not None:
            window.task, window.step = task.index, task.steps
        try:
            self._place_waiting(window)
            if loss is not None and loss.grad_fn is not None and loss.numel() == 1:
                self._look(loss, inputs, window, task, names)
        except Exception:  # never the user's problem; the watching goes on without forensics
            import os, traceback
            if os.environ.get("FXDEBUG"): traceback.print_exc()
            self._off = True

    def gradient_taken(self) -> None:
        """Inside a library's step: the gradient is there, the update comes next."""
        window = self._case.windows.last
        if window is not None and window.after < 0:
            window.after = sequence_number()

    def after(
        self,
        loss: Tensor | None,
        inputs: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        names: Callable[[], Sequence[str]] | None = None,
    ) -> None:
        """The gradient was taken (and in a library's step, the update made)."""
        window = self._case.windows.last
        if self._off or window is None:
            return
        if window.after >= 0:
            self._case.windows.update_lengths[window.site] = sequence_number() - window.after
        else:
            window.after = sequence_number()
        try:
            if self._risky.get(window.site) and not self._suspecting and loss is not None:
                self._check_made(loss, inputs, gradients, window, names)
            self._arm()
        except Exception:
            import os, traceback
            if os.environ.get("FXDEBUG"): traceback.print_exc()
            self._off = True

    def close(self) -> None:
        """The run is over: report what still waits for its line."""
        if self._case.mode is not None:
            self._case.mode.take_off()
        for fault in self._waiting:
            self._emit(fault)
        self._waiting = []

    # -- looking ----------------------------------------------------------------------------------

    def _look(
        self,
        loss: Tensor,
        inputs: Sequence[Tensor],
        window: Window,
        task: Task | None,
        names: Callable[[], Sequence[str]] | None,
    ) -> None:
        value = self._value(loss)
        if value is None or self._looks >= _MOST_LOOKS:
            return
        if math.isfinite(value):
            if self._case.armed and self._suspecting or window.site not in self._risky:
                self._look_backward(loss, inputs, window, task, names)
            return
        self._looks += 1
        self._look_forward(loss, inputs, window, task, names)

    def _value(self, loss: Tensor) -> float | None:
        """The loss, where looking costs no wait for a device (or one is worth it: armed)."""
        plain = physical(loss)[0].detach()
        if plain.device.type != "cpu" and not self._case.armed:
            return None
        return float(plain.sum()) if plain.numel() else None

    def _look_forward(
        self,
        loss: Tensor,
        inputs: Sequence[Tensor],
        window: Window,
        task: Task | None,
        names: Callable[[], Sequence[str]] | None,
    ) -> None:
        graph = Graph(loss, inputs)
        if window.fast < 0 and (started := self._case.windows.unrolled(graph.nodes)) is not None:
            graph.since(started)  # a query's own forward: the steps before it were looked at
        if all(finite(tensor) for tensor in inputs):
            seen = self._seen_live(graph)
            spot = forward.first_bad(graph) if seen is None else None
        else:
            # The weights are bad already: data that is bad by itself still tells.
            seen, spot = None, forward.bad_data(graph)
            if spot is None:
                self._weights_were_bad(graph, window, task, names)
                return
        if seen is not None:
            fault = Fault("forward", "operation", seen.operation, seen.values, seen.dtype)
            fault.line, fault.module, number = seen.site, seen.module, seen.first
        elif spot is not None:
            what = "input" if spot.enters else "operation"
            fault = Fault("forward", what, spot.operation, spot.values, spot.dtype)
            number = spot.node._sequence_nr()
            position = graph.parameter(spot.node)
            if position is not None and names is not None:
                fault.layer = _layer(names()[position])
        else:
            return
        fault.output = float(physical(loss)[0].detach().sum())
        self._found(fault, window, Place(window.site, FORWARD, window.before - number, fault.operation))

    def _seen_live(self, graph: Graph) -> Note | None:
        """The first operation of this loss the checking mode saw turn bad."""
        numbers = {node._sequence_nr() for node in graph.nodes}
        for note in self._case.notes:
            if note.values is not None and numbers.intersection(range(note.first, note.last)):
                return note
        return None

    def _look_backward(
        self,
        loss: Tensor,
        inputs: Sequence[Tensor],
        window: Window,
        task: Task | None,
        names: Callable[[], Sequence[str]] | None,
    ) -> None:
        graph = Graph(loss, inputs)
        risky = bool(backward.risky(graph))
        first_time = window.site not in self._risky
        self._risky[window.site] = risky
        functorch = torch._C._functorch.is_functorch_wrapped_tensor(loss)
        if functorch or not (risky and (first_time or self._suspecting)):
            return
        self._looks += not first_time
        flow = backward.first_bad(self._gradient, graph, inputs)
        if flow is None or flow.dtype in ("float16", "bfloat16"):
            return  # a scaler may skip such a step on purpose
        self._found_flow(flow.node, flow.values, flow.dtype, flow.layers, window, names)

    def _found_flow(
        self,
        node: Any,
        values: Range,
        dtype: str,
        reached: Sequence[int],
        window: Window,
        names: Callable[[], Sequence[str]] | None,
    ) -> None:
        part, home = self._case.windows.part(node._sequence_nr()) or (FORWARD, window)
        place, operation = locate(node, part, home)
        phase = {FORWARD: "backward", GRADIENT: "second backward", UPDATE: "update"}[part]
        fault = Fault(phase, "operation", operation, values, dtype)
        fault.at_step = home.step if home is not window else -1
        if names is not None and reached:
            fault.layers = tuple(dict.fromkeys(_layer(names()[i]) for i in reached))
        self._found(fault, window, place)
        self._suspecting = False

    def _check_made(
        self,
        loss: Tensor,
        inputs: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        window: Window,
        names: Callable[[], Sequence[str]] | None,
    ) -> None:
        """After the call the graph's numbers are freed, but not its shape: name who is suspected."""
        made = [g for g in gradients if g is not None]
        if any(g.device.type != "cpu" for g in made) or any(f.phase != "forward" for f in self._waiting):
            return
        bad = [i for i, g in enumerate(gradients) if g is not None and not finite(g)]
        if not bad or any(not finite(tensor) for tensor in inputs):
            return
        if any(g.dtype in (torch.float16, torch.bfloat16) for g in made):
            return
        if not math.isfinite(self._value(loss) or 0.0):
            return
        suspects = backward.risky(Graph(loss, inputs))
        if suspects:
            self._suspect(suspects[-1], bad, window, names)

    def _suspect(
        self,
        node: Any,
        bad: Sequence[int],
        window: Window,
        names: Callable[[], Sequence[str]] | None,
    ) -> None:
        self._found_flow(node, Range(), "", bad, window, names)
        for fault in self._waiting[-1:]:
            fault.certain = False
        self._suspecting = True

    def _weights_were_bad(
        self,
        graph: Graph,
        window: Window,
        task: Task | None,
        names: Callable[[], Sequence[str]] | None,
    ) -> None:
        """The step before made the weights bad: by its gradient, or by the update itself."""
        row = task.last if task is not None else None
        if task is None or row is None or self._waiting or self._known:
            return
        before = [t for t in row.before if t is not None]
        gradients = [g for g in row.gradients if g is not None]
        after = [t for t in row.after if t is not None]
        if not before or not all(finite(t) for t in before) or _exploded((*before, *gradients)):
            return
        if all(finite(g) for g in gradients):
            worst = [t for t in after if not finite(t)]
            if worst:
                values = Range.of((*before, *gradients))
                fault = Fault("update", "update", "update", values, str(worst[0].dtype)[6:])
                fault.at_step, fault.line = task.steps - 1, window.site
                parameters = task.known.layout.parameters
                fault.layers = tuple(
                    _layer(parameters[i].name)
                    for i, t in enumerate(row.after)
                    if t is not None and not finite(t)
                )[:8]
                self._found(fault, window, None)
            return
        suspects = backward.risky(graph)
        half = (torch.float16, torch.bfloat16)
        if suspects and not any(g.dtype in half for g in gradients):
            bad = [i for i, g in enumerate(gradients) if not finite(g)]
            self._suspect(suspects[-1], bad if len(gradients) == len(graph.inputs) else [], window, names)
            for fault in self._waiting[-1:]:
                fault.at_step = task.steps - 1

    # -- placing and reporting --------------------------------------------------------------------

    def _found(self, fault: Fault, window: Window, place: Place | None) -> None:
        key = (fault.phase, fault.what, fault.operation, fault.layer)
        if key in self._known or len(self._known) >= _MOST_FAULTS:
            return
        self._known.add(key)
        fault.place, fault.site = place, window.site
        fault.task, fault.step = window.task, window.step
        self._waiting.append(fault)
        if place is not None and fault.line < 0:
            self._place(fault, window, own=True)
        if self._session.eager:
            self._release(fault)
            return
        self._case.armed = _ARMED_CALLS
        if fault.line >= 0 and (fault.task >= 0):
            self._release(fault)

    def _place_waiting(self, window: Window) -> None:
        """Look for waiting faults' lines in what ran since the last gradient call."""
        for fault in list(self._waiting):
            fault.waited += 1
            if fault.line < 0:
                self._place(fault, window, own=False)
            self._give_task(fault)
            settled = fault.line >= 0 and fault.task >= 0 and fault.certain
            if settled or fault.waited > _WAITS:
                self._release(fault)

    def _place(self, fault: Fault, window: Window, own: bool) -> None:
        place, notes = fault.place, self._case.notes
        if place is None or not notes:
            return
        windows = self._case.windows.all
        if place.part == UPDATE:
            earlier = windows[-2] if len(windows) > 1 else None
            if earlier is None or earlier.site != place.site:
                return
            note = _note_at(notes, earlier.after, 1, place)
        elif window.site == place.site:
            note = _note_at(notes, window.before, -1, place)
        else:
            return
        if note is not None:
            fault.line = note.site
            if note.module:
                fault.module = note.module

    def _give_task(self, fault: Fault) -> None:
        if fault.task < 0:
            tasks = [t for t in self._session.open if not t.provisional and t.index >= 0]
            if tasks:
                fault.task = tasks[-1].index
                fault.step = max(tasks[-1].steps - 1, 0) if fault.waited <= 1 else -1

    def _release(self, fault: Fault) -> None:
        if fault in self._waiting:
            self._waiting.remove(fault)
        self._emit(fault)
        if not self._waiting and not self._suspecting:
            self._case.armed = 0

    def _emit(self, fault: Fault) -> None:
        self._session.event("forensics", None, fault.line, **fault.data(self._session.sites.name))

    def _arm(self) -> None:
        """On until the next gradient call, while anything is left to find out."""
        case = self._case
        if case.armed <= 0:
            case.mode = None
            case.notes = []
            return
        case.armed -= 1
        if case.mode is None:
            case.mode = CheckingMode(self._session)
        case.mode.push()

    def _task_of(self, inputs: Sequence[Tensor]) -> Task | None:
        """The open task whose fast weights these are."""
        if not self._session.open or not inputs:
            return None
        for task in reversed(self._session.open):
            if any(reference is not None and reference() is inputs[0] for reference in task.fast):
                return task  # type: ignore[no-any-return]
        return None


def _note_at(notes: Sequence[Note], origin: int, sign: int, place: Place) -> Note | None:
    if place.distance is not None:
        number = origin + sign * place.distance
        return next((n for n in notes if n.first <= number < n.last), None)
    same = [n for n in notes if n.operation == place.operation]
    if place.taken is not None:
        number = origin + sign * place.taken
        same = [n for n in same if number in n.taken] or same
    return same[0] if same else None


def _made_by(inputs: Sequence[Tensor]) -> int:
    """One past the last node behind the inputs; -1 where they are leaves."""
    if not inputs:
        return -1
    node = inputs[-1].grad_fn
    return node._sequence_nr() + 1 if node is not None else -1


def _exploded(tensors: Sequence[Tensor]) -> bool:
    """Whether finite values are so large that what follows is an overflow like any other."""
    bounds = [Range.of((t,)) for t in tensors]
    return any(max(abs(b.minimum), abs(b.maximum)) > 1e6 for b in bounds if b.elements)


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0] or parameter
