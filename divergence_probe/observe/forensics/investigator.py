"""Decides when to look for the first bad operation, and hands what is found to the reporter.

When to look: where a loss about to be differentiated is visibly not finite; once at every line
where a gradient is taken through an operation whose derivative can be infinite; and for some calls
after a fault, while the checking mode is armed. Where a loss is seen only by waiting for a device,
a bad one is noticed some steps later: what comes after that is looked at, the next task, say, which
begins with weights that are still good.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from divergence_probe.observe.at_hand import waits_for_nothing, worth_a_wait
from divergence_probe.observe.capture import Number
from divergence_probe.observe.forensics import backward, forward
from divergence_probe.observe.forensics.checking_mode import Note, sequence_number
from divergence_probe.observe.forensics.fault import Fault, locate
from divergence_probe.observe.forensics.graph import Graph, Range, finite
from divergence_probe.observe.forensics.inputs import (
    Inputs,
    Names,
    given,
    growth,
    last_step,
    layers_of,
    made_by,
    nameless,
)
from divergence_probe.observe.forensics.lookout import Lookout
from divergence_probe.observe.forensics.reporter import Reporter
from divergence_probe.observe.forensics.windows import FORWARD, GRADIENT, UPDATE, Place, Window
from divergence_probe.observe.tensors import physical

if TYPE_CHECKING:
    from divergence_probe.observe.session import Session
    from divergence_probe.observe.task import Task
    from divergence_probe.record.schema import Block

_MOST_LOOKS = 24
_HALF = (torch.float16, torch.bfloat16)


def investigator_of(session: Session) -> Investigator:
    """The one investigator of a session."""
    found = session.instruments.get(Investigator)
    if found is None:
        found = session.instruments[Investigator] = Investigator(session)
    return cast(Investigator, found)


class Investigator:
    """Told of every gradient call, before and after; see the module's docstring."""

    def __init__(self, session: Session) -> None:
        self._session: Session = weakref.proxy(session)
        self._reporter = Reporter(self._session)
        self._case = self._reporter.case
        self._gradient: Callable[..., Any] = torch.autograd.grad
        self._risky: dict[int, bool] = {}
        self._lookout = Lookout()
        self._suspecting = False
        self._looks = 0
        self._off = False
        session.begun.append(self._reporter.begins)
        session.settled.append(self._reporter.close)
        session.rows.measured.append(self._measured)

    # -- around a gradient call -------------------------------------------------------------------

    def before(
        self,
        site: int,
        loss: Tensor | None,
        inputs: Inputs,
        task: Task | None = None,
        names: Names | None = None,
        sources: Sequence[Tensor] = (),
        library: bool = False,
    ) -> None:
        """A gradient of ``loss`` with respect to ``inputs`` is about to be taken.

        Args:
            site: number of the user's line.
            loss: the user's own, its graph alive.
            inputs: likewise.
            task: its task, where it is known already.
            names: of the inputs.
            sources: the user's tensors behind the inputs, where a transform wraps them.
            library: whether a library's own step takes it.
        """
        if self._off:
            return
        case = self._case
        window = Window(site, made_by(sources or inputs), sequence_number())
        window.library = library
        self.leave()
        try:
            self._belongs(window, task or self._task_of(sources or inputs))
            case.windows.open(window)
            self._reporter.advance(window)
            if loss is not None and loss.grad_fn is not None and loss.numel() == 1:
                if not (case.armed or self._reporter.known or waits_for_nothing(physical(loss)[0])):
                    self._note_from_afar(loss)
                self._look(loss, inputs, window, names or nameless)
        except Exception:  # never the user's problem: the watching goes on without forensics
            self._give_up()

    def calm(self, site: int, loss: Tensor | None, value: Number = None) -> bool:
        """Whether nothing is looked for at a line, and nothing is seen to be wrong with a loss.

        Then :meth:`passed` says all there is to say of the gradient.

        Args:
            site: number of the line.
            loss: what a gradient is about to be taken of there.
            value: its value, where that was read already.
        """
        if self._case.armed or self._reporter.waiting or self._risky.get(site):
            return False
        if type(value) is float:
            return math.isfinite(value)
        if loss is None or loss.numel() != 1:
            return True
        if not waits_for_nothing(loss):
            self._note_from_afar(loss)
            return not self._case.armed
        return loss.is_floating_point() and math.isfinite(loss.item())

    def has_looked(self, site: int) -> bool:
        """Whether the operations behind a line's gradient were looked through once."""
        return site in self._risky

    def passed(self, window: Window, task: Task, step: int, ended: int = -1) -> None:
        """A gradient was taken where all is calm: a step of a known loop, or a library's.

        Args:
            window: of the call.
            task: which it goes on with.
            step: which of its steps it is.
            ended: where the update is made by now, the number of the next node after it.
        """
        windows = self._case.windows
        windows.go_on(window, task, step)
        windows.open(window)
        if ended >= 0:
            windows.update_lengths[window.site] = ended - window.after

    @property
    def watches(self) -> bool:
        """Whether its checking mode is on."""
        return self._case.mode is not None

    def leave(self) -> None:
        """Leave the mode stack: a gradient call is about to be dispatched."""
        if self._case.mode is not None:
            self._case.notes += self._case.mode.take_off()

    def gradient_taken(self) -> None:
        """Inside a library's step: the gradient is there, the update comes next."""
        window = self._case.windows.last
        if window is not None and window.after < 0:
            window.after = sequence_number()

    def after(
        self,
        loss: Tensor | None,
        inputs: Inputs,
        gradients: Sequence[Tensor | None] | None,
        names: Names | None = None,
    ) -> None:
        """The gradient was taken (None: accumulated); in a library's step, the update made too."""
        window = self._case.windows.last
        if self._off or window is None:
            return
        if window.after >= 0:
            self._case.windows.update_lengths[window.site] = sequence_number() - window.after
        else:
            window.after = sequence_number()
        try:
            if self._risky.get(window.site) and not self._suspecting and loss is not None:
                self._check_made(loss, given(inputs), gradients, window, names or nameless)
            self._reporter.arm(self._suspecting)
        except Exception:
            self._give_up()

    def _give_up(self) -> None:
        self._off = True
        self._reporter.close()
        self._session.unseen(
            "The first bad operation could not be looked for: an error of ours; please report it."
        )

    def _note_from_afar(self, loss: Tensor) -> None:
        """A loss that is not at hand: arm where an earlier one has turned out to be bad."""
        try:
            if self._lookout.notices(physical(loss)[0].detach()):
                self._reporter.alarm(afar=True)
        except Exception:
            self._give_up()

    def _measured(self, block: Block) -> None:
        """A block was measured: where looking at each loss would wait for a device, arm now."""
        if self._off or self._reporter.known or not len(block):
            return
        losses = block.scalars["loss"][block.scalars["loss_seen"] > 0]
        if not np.isfinite(losses).all():
            self._reporter.alarm()

    # -- looking ----------------------------------------------------------------------------------

    def _look(self, loss: Tensor, inputs: Inputs, window: Window, names: Names) -> None:
        value = self._value(loss, window)
        if value is None or self._looks >= _MOST_LOOKS:
            return
        bad = not math.isfinite(value)
        suspecting = self._case.armed and self._suspecting
        if not bad and not suspecting and window.site in self._risky:
            return
        tensors = given(inputs)
        if window.task is None:
            self._belongs(window, self._task_of(tensors))
        if bad:
            self._looks += 1
            self._look_forward(loss, tensors, window, names)
        else:
            self._look_backward(loss, tensors, window, names)

    def _value(self, loss: Tensor, window: Window | None = None) -> float | None:
        """The loss, where looking costs no wait for a device, or one is worth it.

        (While armed, and at a line of which nothing is known yet.)
        """
        if waits_for_nothing(loss) and not torch._C._functorch.is_functorch_wrapped_tensor(loss):
            return float(loss.item())
        value = physical(loss)[0].detach()
        if not waits_for_nothing(value) and not (
            worth_a_wait(value)
            and (self._case.armed or (window is not None and window.site not in self._risky))
        ):
            return None
        return float(value if value.numel() == 1 else value.sum())

    def _look_forward(
        self, loss: Tensor, inputs: Sequence[Tensor], window: Window, names: Names
    ) -> None:
        graph = Graph(loss, inputs)
        self._own_task(graph, window)
        unrolled = self._case.windows.unrolled(graph.nodes, window) if window.fast < 0 else None
        if unrolled is not None:
            if self._reporter.known or self._adapted_badly(window):
                return
            graph.since(unrolled)  # a query's own forward: the steps before it were looked at
        spoiled = [i for i, tensor in enumerate(inputs) if not finite(tensor)]
        if not spoiled:
            seen = self._seen_live(graph)
            spot = forward.first_bad(graph) if seen is None else None
        else:
            # The weights are bad already: data that is bad by itself still tells, and so does,
            # where no step made them so, an operation on what the good ones lead to.
            seen, spot = None, forward.bad_data(graph)
            if spot is None:
                self._weights_were_bad(graph, window)
                begins = window.task is None or window.task.last is None
                if begins and not self._reporter.known:
                    spot = forward.first_bad(graph, spoiled)
        if seen is not None:
            values = seen.values or Range()
            fault = Fault("forward", "operation", seen.operation, values, seen.dtype)
            fault.line, fault.module, number = seen.site, seen.module, seen.first
        elif spot is not None:
            what = "input" if spot.enters else "operation"
            fault = Fault("forward", what, spot.operation, spot.values, spot.dtype)
            fault.largest = spot.largest
            number = spot.node._sequence_nr()
            position = graph.parameter(spot.node)
            if position is not None:
                fault.layer = next(iter(layers_of(names(inputs), [position])), None)
        else:
            return
        fault.output = self._value(loss) or 0.0
        fault.growth = growth(window.task, inputs)
        place = Place(window.site, FORWARD, window.before - number, fault.operation)
        self._reporter.found(fault, window, place, bool(spoiled))

    def _adapted_badly(self, window: Window) -> bool:
        """Whether the last inner step left weights that are not finite."""
        row = window.task.last if window.task is not None else None
        return row is not None and not all(finite(t) for t in row.after if t is not None)

    def _seen_live(self, graph: Graph) -> Note | None:
        """The first operation of this loss the checking mode saw turn bad."""
        numbers = {node._sequence_nr() for node in graph.nodes}
        for note in self._case.notes:
            if note.values is not None and numbers.intersection(range(note.first, note.last)):
                return note
        return None

    def _look_backward(
        self, loss: Tensor, inputs: Sequence[Tensor], window: Window, names: Names
    ) -> None:
        graph = Graph(loss, inputs)
        risky = bool(backward.risky(graph))
        first_time = window.site not in self._risky
        self._risky[window.site] = risky
        functorch = torch._C._functorch.is_functorch_wrapped_tensor(loss)
        if functorch or not risky:
            return
        self._looks += not first_time
        flow = backward.first_bad(self._gradient, graph, inputs)
        if flow is None or flow.dtype in ("float16", "bfloat16"):
            return  # a scaler may skip such a step on purpose
        self._own_task(graph, window)
        fault, place = self._fault_of(flow.node, flow.values, flow.dtype, window)
        fault.layers = layers_of(names(inputs), flow.layers)
        self._suspecting = False
        self._reporter.found(fault, window, place)

    def _own_task(self, graph: Graph, window: Window) -> None:
        """A gradient through finished steps belongs to the task they are of."""
        if window.task is None and self._case.windows.unrolled(graph.nodes, window) is not None:
            task = next(reversed(self._session.open), None)
            window.belongs = weakref.ref(task) if task is not None else None

    def _fault_of(
        self, node: Any, values: Range, dtype: str, window: Window
    ) -> tuple[Fault, Place | None]:
        part, home = self._case.windows.part(node._sequence_nr()) or (FORWARD, window)
        place, operation = locate(node, part, home)
        phase = {FORWARD: "backward", GRADIENT: "second backward", UPDATE: "update"}[part]
        fault = Fault(phase, "operation", operation, values, dtype)
        fault.step = home.step
        if part == UPDATE and home.library:
            fault.line = home.site
        return fault, place

    def _check_made(
        self,
        loss: Tensor,
        inputs: Sequence[Tensor],
        gradients: Sequence[Tensor | None] | None,
        window: Window,
        names: Names,
    ) -> None:
        """After the call the graph's numbers are freed, but not its shape: name a suspect."""
        gradients = [tensor.grad for tensor in inputs] if gradients is None else gradients
        made = [g for g in gradients if g is not None]
        may = worth_a_wait if self._case.armed else waits_for_nothing
        if self._reporter.known or any(not may(g) or g.dtype in _HALF for g in made):
            return
        bad = [i for i, g in enumerate(gradients) if g is not None and not finite(g)]
        if not bad or any(not finite(tensor) for tensor in inputs):
            return
        if math.isfinite(self._value(loss) or 0.0):
            self._suspect(Graph(loss, inputs), layers_of(names(inputs), bad), window)

    def _suspect(self, graph: Graph, layers: tuple[str, ...], window: Window) -> None:
        """Report what is most likely, unless it is seen to fail soon; the numbers are gone."""
        suspects = backward.risky(graph)
        suspects = [node for node in suspects if backward.is_singular(node)] or suspects
        if not suspects:
            return
        self._own_task(graph, window)
        fault, place = self._fault_of(suspects[-1], Range(), "", window)
        fault.certain = False
        fault.layers = layers
        self._suspecting = True
        self._reporter.found(fault, window, place)

    def _weights_were_bad(self, graph: Graph, window: Window) -> None:
        """The step before made the weights bad: by its gradient, or by the update itself."""
        if window.task is None or self._reporter.known:
            return
        step = last_step(window.task)
        if step is None:
            return
        if step.bad_gradients and not step.overflows(graph):
            self._suspect(graph, step.bad_gradients, window)
            self._reporter.latest_was_before(window)
        elif step.bad_gradients or step.bad_weights:
            phase, what = ("backward", "gradient") if step.bad_gradients else ("update", "update")
            fault = Fault(phase, what, what, step.values, step.dtype)
            fault.line, fault.step = window.site, window.task.steps - 1
            fault.layers = step.bad_gradients or step.bad_weights
            self._reporter.found(fault, window, None)

    def _belongs(self, window: Window, task: Task | None) -> None:
        """Note the task a gradient call goes on with, where it is known."""
        if task is not None:
            self._case.windows.go_on(window, task, task.steps)

    def _task_of(self, inputs: Inputs) -> Task | None:
        """The open task whose fast weights these are."""
        if callable(inputs) or not self._session.open or not inputs:
            return None
        first = inputs[0]
        for task in reversed(self._session.open):
            if any(reference is not None and reference() is first for reference in task.fast):
                return task
        return None
