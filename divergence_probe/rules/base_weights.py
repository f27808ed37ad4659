"""Weights one task leaves behind for the next, or for the outer step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from divergence_probe.record.schema import Array, Flags
from divergence_probe.record.task_rows import Numbers
from divergence_probe.rules.base import Frame, Rule
from divergence_probe.rules.finding import Finding, Mark, Severity
from divergence_probe.rules.outer_times import OuterTimes
from divergence_probe.rules.quantities import known
from divergence_probe.thresholds import Thresholds


@dataclass(frozen=True)
class _Places:
    """Where the base is in a block: at each task's start and each outer step, in order of time.

    The first of the ``K`` places is the last of the block before.

    Attributes:
        task: ``[K]`` the task that begins; -1 for an outer step, or where nothing is known.
        start: ``[K, P]`` norms at this place.
        ended: ``[K, P]`` norms the task came to, before the next place.
    """

    task: npt.NDArray[np.float64]
    start: Array
    ended: Array

    def moved(self) -> Flags:
        """``[K - 1, P]`` what is, from the second place on, not where the task before began."""
        ours, earlier = self.start[1:], self.start[:-1]
        other = (self.task[:-1] >= 0) & (self.task[1:] != self.task[:-1])
        return np.asarray(self.measured() & ~_alike(ours, earlier) & other[:, None])

    def measured(self) -> Flags:
        """``[K - 1, P]`` what was measured at a place, and all along the task before it."""
        measured = np.isfinite(self.start)
        return np.asarray(measured[1:] & measured[:-1] & np.isfinite(self.ended[:-1]))


class BaseMutated(Rule):
    """The inner loop changed the base model for the tasks after it.

    ## What it does
    Compares the weights each task starts from with those the task before started from. Where they
    differ and no outer step came between, the inner loop itself moved the base. Steps that make new
    tensors, or write into copies, can only have done so where a task begins with what the one
    before left; other weights then are another model's, or were moved by hand.

    ## Why it is bad
    Tasks are no longer independent: each starts where the last one ended, at least in part.
    It is what Reptile and continual adaptation mean to do; then it is a remark, and
    ``--intent reptile`` or ``--intent continual`` silences it.

    ## Example
    ```python
    fast = list(net.parameters())
    for w, g in zip(fast, grads):
        w.data -= lr * g               # writes into the base model
    ```

    ## Use instead
    ```python
    fast = [w - lr * g for w, g in zip(fast, grads)]
    ```

    ## References
    Nichol et al., On first-order meta-learning algorithms, 2018, for the case where it is meant.
    """

    code = "BASE001"
    name = "base-model-mutated"
    severity = Severity.WARNING
    cause = "base-mutated"

    def __init__(self, thresholds: Thresholds) -> None:
        super().__init__(thresholds)
        # by rank and layout: the task that began last, where, and how far it has come
        self._latest: dict[tuple[int, int], tuple[int, Array, Array]] = {}
        self._instances: dict[tuple[int, int], object] = {}
        self._outer_steps = False
        self._without_effect = 0
        self._stepped = OuterTimes()
        self._seconds: dict[tuple[int, int], float] = {}  # when the last task began, as above

    def check(self, frame: Frame) -> Iterator[Finding]:
        """Compare each task's first row with the task before it, in order of time."""
        yield from self._restores(frame)
        rows = np.flatnonzero(frame.begins | frame.outer)
        others = self._of_other_models(frame, rows)
        places = self._places(frame, rows)
        moved = places.moved()
        between = self._stepped_between(frame, rows)
        for number in np.flatnonzero(moved.any(1)).tolist():
            row = int(rows[number])
            if frame.outer[row]:
                yield from self._stepped_from(frame, row, moved[number], places.ended[number])
            elif row not in others:
                yield from self._begun(frame, row, places, number, bool(between[number]))
        self._keep(frame, places)

    def _restores(self, frame: Frame) -> Iterator[Finding]:
        for event in frame.events("restore-without-effect"):
            # Once may be the first restore, of a state saved just before it.
            self._without_effect += 1
            if self._without_effect < 2:
                continue
            yield self.finding(
                "load_state_dict puts back the very weights the task ended with: the state was "
                "kept by reference, so nothing is restored",
                marks=(Mark(event.site, "restores nothing"),) if event.site else (),
                fix="saved = copy.deepcopy(net.state_dict())   # state_dict() alone does not copy",
            )

    def _of_other_models(self, frame: Frame, rows: Numbers) -> set[int]:
        """Rows where a task begins on another model than the task before.

        (One of the same structure, which begins where it likes.)
        """
        others: set[int] = set()
        layout = _layout(frame)
        for row in rows[frame.begins[rows]].tolist():
            facts = frame.tasks.get(int(frame.task[row]))
            instance = facts.data.get("instance") if facts is not None else None
            if self._instances.get(layout, instance) != instance:
                others.add(row)
            self._instances[layout] = instance
        return others

    def _places(self, frame: Frame, rows: Numbers) -> _Places:
        """The places at ``rows``, and the one before them."""
        before, after = known(frame, "norm_before"), known(frame, "norm_after")
        nothing = np.full(before.shape[1], np.nan)
        task, start, ended = self._latest.get(_layout(frame), (-1, nothing, nothing))
        if len(start) != len(nothing):
            task, start, ended = -1, nothing, nothing
        tasks = np.append(task, np.where(frame.outer[rows], -1, frame.task[rows]))
        # the place each row comes after, and the last row of its task there
        place = np.cumsum(frame.begins | frame.outer)
        own = np.flatnonzero(frame.support & (frame.task == tasks[place]))
        last = np.full(len(tasks), -1)
        last[place[own]] = own
        ends = np.full((len(tasks), len(nothing)), np.nan)
        ends[0] = ended
        ends[last >= 0] = after[last[last >= 0]]
        return _Places(tasks, np.concatenate([start[None], before[rows]]), ends)

    def _stepped_between(self, frame: Frame, rows: Numbers) -> Flags:
        """Whether an outer step of something else came between the places at ``rows``."""
        begun = frame.block.scalars["seconds"][rows]
        self._stepped.note(frame, left_out=begun[frame.outer[rows]].tolist())
        if not len(rows):
            return np.zeros(0, dtype=bool)
        key = _layout(frame)
        earlier = np.append(self._seconds.get(key, -np.inf), begun[:-1])
        self._seconds[key] = float(begun[-1])
        return self._stepped.between(frame, earlier, begun)

    def _keep(self, frame: Frame, places: _Places) -> None:
        """Remember the last place for the next block."""
        layout = _layout(frame)
        if frame.outer.any():
            self._outer_steps = True
            # A copy that lists its parameters otherwise has another layout: the outer step is
            # between its tasks all the same.
            self._latest = {k: v for k, v in self._latest.items() if k[0] != layout[0]}
        if places.task[-1] >= 0:
            # copies: a row of a block's array would keep all of it
            start, ended = places.start[-1].copy(), places.ended[-1].copy()
            self._latest[layout] = (int(places.task[-1]), start, ended)

    def _stepped_from(
        self, frame: Frame, row: int, moved: Flags, ended: Array
    ) -> Iterator[Finding]:
        """An outer step that starts from what the inner loop wrote, not from where it began.

        (Most of what was moved is there; of a small move one norm may be by accident, where the
        weights were moved otherwise: adversarially, say.)
        """
        here = known(frame, "norm_before")[row]
        left = moved & np.isclose(here, ended, rtol=1e-6)
        if not 2 * left.sum() > moved.sum():
            return
        layers = tuple(dict.fromkeys(frame.layer(int(c)) for c in np.flatnonzero(moved)))
        yield self.at(
            frame,
            row,
            f"the outer step starts from the weights the inner loop left in the base "
            f"({frame.called(layers)})",
            "the base was changed before this outer step",
            layer=layers[0],
            layers=layers,
            fix="Adapt a copy: fast = [w - lr * g ...] without .data and without in-place writes.",
        )

    def _begun(
        self, frame: Frame, row: int, places: _Places, number: int, stepped: bool
    ) -> Iterator[Finding]:
        """A task that begins elsewhere than the one before."""
        start, earlier = places.start[number + 1], places.start[number]
        ended, measured = places.ended[number], places.measured()[number]
        moved = measured & ~_alike(start, earlier)
        kept = measured & _alike(start, ended)
        adapted = measured & ~_alike(ended, earlier)
        facts = frame.tasks.get(int(frame.task[row]))
        if facts is None or not _spares_the_base(facts.data) or (kept & adapted).any():
            yield self._describe(frame, row, moved, kept, adapted, stepped)

    def _describe(
        self, frame: Frame, row: int, moved: Flags, kept: Flags, adapted: Flags, stepped: bool
    ) -> Finding:
        columns = np.flatnonzero(moved)
        layers = tuple(dict.fromkeys(frame.layer(int(c)) for c in columns))
        carried = bool((kept & adapted).any())
        restored = bool((adapted & ~moved).any())
        half = carried and restored
        # Everything carried over, or moved elsewhere, may be meant (continual, Reptile); a reset
        # of some weights only is not, nor is a base that an outer step is to move as well.
        # What another outer step came between (a learned optimizer's, over a stretch of training)
        # is a stretch.
        expected = self._outer_steps or bool(frame.outer[:row].any())
        meant = not half and (stepped or not (carried and expected))
        how = "only partly restored" if half else "not where the task before began"
        return self.at(
            frame,
            row,
            f"task {int(frame.task[row])} begins with weights {how} ({frame.called(layers)}), with "
            f"no outer step{' of theirs' * stepped} between",
            "the task begins with weights another task left",
            severity=Severity.INFO if meant else Severity.WARNING,
            layer=layers[0],
            layers=layers,
            evidence={"parameters_moved": float(moved.sum())},
            fix="Adapt a copy: copy.deepcopy(net), or fast = [w - lr * g ...] without writing into "
            "the base.",
        )


def _spares_the_base(data: Mapping[str, object]) -> bool:
    """Whether a task's steps are seen to write into none of the tensors it began from."""
    if "adapter" not in data:
        return False
    own = data.get("in_place") and not data.get("copied")
    return not data.get("writes_base", own)


def _layout(frame: Frame) -> tuple[int, int]:
    return frame.block.rank, frame.block.layout.index


def _alike(left: Array, right: Array) -> Flags:
    """Equal norms but for rounding, as ``np.isclose`` without what that costs on a few numbers."""
    with np.errstate(all="ignore"):
        return np.asarray(np.abs(left - right) <= 1e-6 * np.abs(right))
