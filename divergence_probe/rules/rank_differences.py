"""Where a quantity differs between ranks, and which of them are the odd ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from divergence_probe.rules.finding import Mark
from divergence_probe.rules.rank_windows import EVAL, PHASES, TRAIN, Window, same_rate

_T = TypeVar("_T")

#: A single task's setting may be that task's own; from two on it is the rank's.
FEWEST_TASKS = 2
_MODES = {EVAL: "eval", TRAIN: "train"}


@dataclass(frozen=True)
class Difference:
    """Where one quantity was first seen to differ.

    Attributes:
        number: outer step, from 0.
        ranks: the odd ones.
        what: the quantity, in the plural.
        text: what differs, in a sentence's main part.
        fix: what to change.
        phase: as of a finding.
        marks: as of a finding.
        layers: as of a finding.
        evidence: as of a finding.
        above: whether the odd ranks' value is the larger.
        tasks: how many tasks a rank, the fewest, this was seen in.
        follows: whether it follows from what else differs at the same outer step.
    """

    number: int
    ranks: tuple[int, ...]
    what: str
    text: str
    fix: str
    phase: str
    marks: tuple[Mark, ...] = ()
    layers: tuple[str, ...] = ()
    evidence: Mapping[str, float | str] = field(default_factory=dict)
    above: bool = False
    tasks: int = FEWEST_TASKS
    follows: bool = False


class Course:
    """One setting over the outer steps: it counts where it stays different once it differs."""

    def __init__(self) -> None:
        self._first: Difference | None = None
        self._tasks = 0
        self._steady = True

    def differs(self, difference: Difference) -> None:
        """It differs at the next outer step."""
        self._first = self._first or difference
        # What is chosen for each task (a line search) is now larger here, now there.
        self._steady &= self._first.above == difference.above
        self._tasks += difference.tasks

    def agrees(self) -> None:
        """It is the same on all ranks at the next outer step."""
        self._steady &= self._first is None

    @property
    def difference(self) -> Difference | None:
        """Where it began to differ for good, or None."""
        return self._first if self._steady and self._tasks >= FEWEST_TASKS else None


def modes(number: int, windows: Mapping[int, Window]) -> Difference | bool:
    """The first layer that runs in another mode on some ranks; else whether any was compared."""
    compared = False
    for phase, layer in first_of(windows).modes:
        ran = {rank: window.modes.get((phase, layer), 0) for rank, window in windows.items()}
        if not all(mode in _MODES for mode in ran.values()):
            continue  # not called on some rank, or in both modes (an evaluation in between)
        compared = True
        odd, against = parted(ran, lambda one, other: one == other)
        if odd:
            return Difference(
                number,
                odd,
                "modes",
                f"{first_of(windows).spoken[layer]} runs in {_MODES[ran[odd[0]]]} mode on "
                f"{ranks_of(odd)} and in {_MODES[ran[against]]} mode on rank {against} in the "
                f"{PHASES[phase]} phase, {since(number)}",
                "Call net.train() and net.eval() on every rank alike, and net.train() again after "
                "an evaluation on rank 0 only.",
                PHASES[phase],
                _here(windows[odd[0]], "another mode on", odd),
                (layer,),
                above=ran[odd[0]] > ran[against],
                tasks=_tasks(windows),
            )
    return compared


def lengths(number: int, windows: Mapping[int, Window]) -> Difference | bool:
    """Other numbers of inner steps a task; else whether they were compared."""
    of_rank = {rank: set(window.lengths.values()) for rank, window in windows.items()}
    if not all(len(one) == 1 for one in of_rank.values()):
        return False  # steps vary from task to task (early stopping), or there are none
    taken = {rank: next(iter(one)) for rank, one in of_rank.items()}
    odd, against = parted(taken, lambda one, other: one == other)
    if not odd:
        return True
    return Difference(
        number,
        odd,
        "numbers of inner steps",
        f"{ranks_of(odd)} took {taken[odd[0]]} inner steps a task and rank {against} "
        f"{taken[against]}, {since(number)}",
        "Give every rank the same number of inner steps.",
        "support",
        _here(windows[odd[0]], "another number of steps on", odd),
        evidence={"steps": float(taken[odd[0]]), "steps_elsewhere": float(taken[against])},
        above=taken[odd[0]] > taken[against],
        tasks=_tasks(windows),
    )


def rates(number: int, windows: Mapping[int, Window]) -> Difference | bool:
    """Other inner learning rates; else whether they were compared."""
    if any(window.rates_vary for window in windows.values()):
        return False
    steps = set.intersection(*(set(window.rates) for window in windows.values()))
    for step in sorted(steps):
        of_rank = {rank: window.rates[step] for rank, window in windows.items()}
        odd, against = parted(of_rank, same_rate)
        if odd:
            return Difference(
                number,
                odd,
                "inner learning rates",
                f"the inner learning rate is {of_rank[odd[0]]:.4g} on {ranks_of(odd)} and "
                f"{of_rank[against]:.4g} on rank {against}, {since(number)}",
                "Give every rank the same inner learning rate; where it is learned, average its "
                "gradient over the ranks too.",
                "support",
                _here(windows[odd[0]], "another learning rate on", odd),
                evidence={"rate": of_rank[odd[0]], "rate_elsewhere": of_rank[against]},
                above=of_rank[odd[0]] > of_rank[against],
                tasks=_tasks(windows),
            )
    return bool(steps)


def parted(values: Mapping[int, _T], same: Callable[[_T, _T], bool]) -> tuple[tuple[int, ...], int]:
    """The ranks that differ from most (of two, from the lower one), and the lowest of those most.

    Args:
        values: by rank.
        same: whether two are one.
    """
    groups: list[list[int]] = []
    for rank in sorted(values):
        for group in groups:
            if same(values[group[0]], values[rank]):
                group.append(rank)
                break
        else:
            groups.append([rank])
    most = max(groups, key=len)
    return tuple(rank for rank in sorted(values) if rank not in most), most[0]


def first_of(by_rank: Mapping[int, _T]) -> _T:
    """The lowest rank's."""
    return by_rank[min(by_rank)]


def ranks_of(ranks: tuple[int, ...]) -> str:
    """``"rank 1"``, ``"ranks 1 and 3"``, ``"ranks 1, 2 and 3"``."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def since(number: int) -> str:
    """From which outer step on, in words."""
    return f"from outer step {number} on" if number else "from the start"


def _tasks(windows: Mapping[int, Window]) -> int:
    return min(len(window.lengths) for window in windows.values())


def _here(window: Window, text: str, ranks: tuple[int, ...]) -> tuple[Mark, ...]:
    return (Mark(window.site, f"{text} {ranks_of(ranks)}"),) if window.site else ()
