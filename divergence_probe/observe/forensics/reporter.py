"""Gives a fault its line and its task, and reports it once.

The graph does not know the user's lines. So after a fault the checking mode is armed, and the line
is read off the next time the same code runs: by then the numbers may all be NaN, but the operation
still stands at the same distance from its gradient call.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from divergence_probe.observe.forensics.checking_mode import CheckingMode, Note
from divergence_probe.observe.forensics.fault import Fault
from divergence_probe.observe.forensics.windows import UPDATE, Place, Window, Windows

if TYPE_CHECKING:
    from divergence_probe.observe.session import Session
    from divergence_probe.observe.task import Task

_ARMED_CALLS = 48
_ALARMED_CALLS = 4
_ARMED_IN_ALL = 256
_MOST_FAULTS = 8


class Case(threading.local):
    """What one thread is in the middle of."""

    def __init__(self) -> None:
        self.windows = Windows()
        self.mode: CheckingMode | None = None
        self.notes: list[Note] = []
        self.armed = 0


class Reporter:
    """Faults on their way to the recording."""

    def __init__(self, session: Session) -> None:
        self.case = Case()
        self._session = session
        #: Faults that were found and are not reported yet.
        self.waiting: list[Fault] = []
        self._keys: set[tuple[object, ...]] = set()
        self._outside = False  # whether the fault known is one outside of tasks
        self._budget = _ARMED_IN_ALL

    @property
    def known(self) -> bool:
        """Whether a fault was found already: what is bad from then on may be its doing."""
        return bool(self._keys)

    def found(
        self, fault: Fault, window: Window, place: Place | None, spoiled: bool = False
    ) -> None:
        """Take a new fault; one like an earlier one is dropped, a suspicion gives way to proof.

        Args:
            fault: it.
            window: of the gradient call it was found at.
            place: where it is from there.
            spoiled: whether the weights were bad already.
        """
        key = (fault.phase, fault.what, fault.operation, fault.layer, fault.certain)
        if key in self._keys or len(self._keys) >= _MOST_FAULTS:
            return
        if fault.what == "input" and (
            self._came_of_an_earlier_one(window) or (spoiled and self.known)
        ):
            return
        self._keys.add(key)
        fault.place, fault.site = place, window.site
        fault.task = window.task
        if fault.step < 0:
            fault.step = window.step
        if fault.certain:
            for suspicion in [other for other in self.waiting if not other.certain]:
                if (suspicion.phase, suspicion.operation) == (fault.phase, fault.operation):
                    fault.task, fault.step = suspicion.task, suspicion.step
                self.waiting.remove(suspicion)
        self.waiting.append(fault)
        if fault.line < 0:
            self._give_line(fault, window)
        if self._session.rows.eager or self._complete(fault):
            self._release(fault)
        if fault in self.waiting:
            self.case.armed = min(_ARMED_CALLS, self._budget)

    def _came_of_an_earlier_one(self, window: Window) -> bool:
        """What enters a task is bad after an operation outside of it failed: that is the fault.

        (In the outer loop, of what the tasks are given: data that is learned, weights of samples.)
        """
        failed = (f for f in self.waiting if f.what == "operation" and f.certain)
        earlier = next((fault for fault in failed if not _confirmed(fault)), None)
        if earlier is None:
            return self._outside
        self._outside = True
        if window.task is not None:  # (or one that is seen to be given it will follow)
            earlier.task, earlier.step = window.task, window.step
        if self._complete(earlier):
            self._release(earlier)
        return True

    def latest_was_before(self, window: Window) -> None:
        """The fault just found was made by the step before ``window``'s."""
        if self.waiting and self.waiting[-1].site == window.site and window.step > 0:
            self.waiting[-1].step = window.step - 1

    def alarm(self, afar: bool = False) -> None:
        """Something is wrong, and nothing is known yet.

        Args:
            afar: whether that was some steps ago, so that a task which begins anew is waited for.
        """
        calls = _ARMED_CALLS if afar else _ALARMED_CALLS
        self.case.armed = max(self.case.armed, min(calls, self._budget))

    def advance(self, window: Window) -> None:
        """Another gradient call begins: look what waiting faults can be given now."""
        for fault in list(self.waiting):
            fault.waited += 1
            if fault.line < 0:
                self._give_line(fault, window)
            if fault.task is None:
                fault.task = next(reversed(self._session.open), None)
                if fault.task is not None and fault.step < 0 and fault.waited == 1:
                    fault.step = max(fault.task.steps - 1, 0)
            if self._complete(fault) or (fault.waited > _ARMED_CALLS and _confirmed(fault)):
                self._release(fault)

    def begins(self, task: Task) -> None:
        """A task has begun: with the gradient a fault was found at, if none was taken since."""
        for fault in self.waiting:
            if fault.task is None and not fault.waited:
                fault.task, fault.step = task, max(fault.step, 0)

    def arm(self, suspecting: bool) -> None:
        """Until the next gradient call, while anything is left to find out."""
        case = self.case
        wanted = suspecting or any(fault.line < 0 for fault in self.waiting)
        case.notes = []
        if case.armed <= 0 or not (wanted or not self.known):
            case.mode, case.armed = None, 0
            return
        case.armed -= 1
        self._budget -= 1
        if case.mode is None:
            case.mode = CheckingMode(self._session)
        self._session.guard.state.once_over(case.mode.go_on)

    def close(self) -> None:
        """Report what still waits, but nothing of what turned out to be ordinary training."""
        if self.case.mode is not None:
            self.case.mode.take_off()
            self.case.mode = None
        self.case.armed = 0
        for fault in list(self.waiting):
            if _confirmed(fault):
                self._release(fault)
        self.waiting = []

    def _complete(self, fault: Fault) -> bool:
        return fault.line >= 0 and fault.certain and _confirmed(fault)

    def _release(self, fault: Fault) -> None:
        self.waiting.remove(fault)
        data = fault.data(self._session.sites.name)
        self._session.event("forensics", None, fault.line, **data)

    def _give_line(self, fault: Fault, window: Window) -> None:
        """The line of what ran at the fault's place since the last gradient call, if it did."""
        place, notes, windows = fault.place, self.case.notes, self.case.windows.all
        if place is None or not notes:
            return
        note = None
        if place.part == UPDATE:
            earlier = windows[-2] if len(windows) > 1 else None
            if earlier is not None and earlier.site == place.site:
                note = _note_at(notes, earlier.after, 1, place)
        elif window.site == place.site:
            note = _note_at(notes, window.before, -1, place)
        if note is not None:
            fault.line = note.site
            fault.module = note.module or fault.module


def _confirmed(fault: Fault) -> bool:
    """Whether it happened in an inner loop, and not in ordinary training."""
    return fault.task is not None and not fault.task.provisional and fault.task.index >= 0


def _note_at(notes: Sequence[Note], origin: int, sign: int, place: Place) -> Note | None:
    same = [note for note in notes if note.operation == place.operation]
    if place.distance is not None:
        number = origin + sign * place.distance
        exact = next((n for n in notes if n.first <= number < n.last), None)
        # a first step makes fewer nodes than later ones (moments that are constants yet)
        if exact is None or exact in same or not same:
            return exact
        return min(same, key=lambda note: abs(note.first - number))
    if place.taken is not None:
        number = origin + sign * place.taken
        same = [n for n in same if number in n.taken] or same
    return same[0] if same else None
