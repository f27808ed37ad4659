"""Processes that work together and no longer agree: what ranks recorded, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from divergence_probe.record.schema import Array, Flags
from divergence_probe.rules import rank_differences
from divergence_probe.rules.base import Frame, Rule, missing_to_nan
from divergence_probe.rules.finding import Finding, Mark, Severity
from divergence_probe.rules.rank_differences import (
    Course,
    Difference,
    first_of,
    parted,
    ranks_of,
    since,
)
from divergence_probe.rules.rank_windows import Rows, State, Window, names_of
from divergence_probe.thresholds import Thresholds

#: Outer steps one rank may be behind the others before it is compared without.
_BEHIND = 4096
_SETTINGS = (rank_differences.modes, rank_differences.lengths, rank_differences.rates)
_BROADCAST = (
    "for tensor in net.state_dict().values():\n"
    "    torch.distributed.broadcast(tensor, src=0)  # once, before training"
)
_AVERAGE = (
    "for p in net.parameters():  # before every outer step\n"
    "    torch.distributed.all_reduce(p.grad)\n"
    "    p.grad /= torch.distributed.get_world_size()\n"
    "# DistributedDataParallel does it for forwards through its wrapper only"
)


class _Weights:
    """The base's weights, and the gradients applied to them, over the outer steps."""

    def __init__(self) -> None:
        self.agreed = False
        self.averaged_now_and_then = False
        self.first: Difference | None = None
        self.gradients_agreed = False
        self.gradients_differ: bool | None = None

    @property
    def difference(self) -> Difference | None:
        """Where they parted for good, or None."""
        return None if self.averaged_now_and_then else self.first

    @property
    def independent(self) -> bool:
        """Whether the ranks never shared anything, as far as they took outer steps."""
        never = not self.agreed and not self.gradients_agreed
        return never and bool(self.gradients_differ)


class RankDivergence(Rule):
    """Under torch.distributed one rank's inner loop or base model differs from the others'.

    ## What it does
    Compares what the ranks of one process group recorded, outer step by outer step: the base's
    weights, the inner learning rate, the number of inner steps, the mode of every BatchNorm and
    dropout layer, and the running statistics. Says which differed first, from which outer step on,
    and on which rank. Tasks may differ, and with them losses and gradients of the inner loop.

    Data parallel training applies one averaged gradient to equal weights on every rank, so that
    the base's weights stay equal after every outer step. Weights that come back together (averaged
    every few steps) are meant to part in between. Running statistics of different tasks differ
    unless they are broadcast: a remark, but for a rank whose statistics were never trained.

    ## Why it is bad
    The ranks train different models, the average of their gradients belongs to none of them, and
    what rank 0 saves is not what was measured.

    ## Example
    ```python
    net = DistributedDataParallel(net)
    with higher.innerloop_ctx(net.module, opt) as (fnet, diffopt):   # past the wrapper's forward
        ...
    loss.backward(); meta_opt.step()                                 # every rank by itself
    ```

    ## Use instead
    ```python
    loss.backward()
    for p in net.parameters():
        torch.distributed.all_reduce(p.grad)
        p.grad /= torch.distributed.get_world_size()
    meta_opt.step()
    ```

    ## References
    Li et al., PyTorch Distributed, VLDB 2020, section 3: equal weights by equal gradients; PyTorch
    documentation of DistributedDataParallel on ``broadcast_buffers``.
    """

    code = "RANK001"
    name = "rank-divergence"
    severity = Severity.WARNING
    cause = "rank-divergence"
    across_ranks = True

    def __init__(self, thresholds: Thresholds) -> None:
        super().__init__(thresholds)
        self._world = 0
        self._since: dict[int, float] = {}
        self._counts: dict[int, int] = {}
        self._windows: dict[int, Window] = {}
        self._waiting: dict[int, dict[int, State]] = {}
        self._weights = _Weights()
        self._settings = [Course() for _ in _SETTINGS]
        self._statistics: dict[Severity, Difference] = {}

    def check(self, frame: Frame) -> Iterator[Finding]:
        """Gather each rank's outer steps; compare those that all ranks have taken."""
        rank = frame.block.rank
        for event in frame.events("process-group"):
            self._since.setdefault(rank, event.seconds)
            self._world = max(self._world, int(event.data.get("world", 0)))
        outer = np.flatnonzero(frame.outer)
        count = self._counts.get(rank, 0)
        self._counts[rank] = count + len(outer)
        if rank in self._since:
            # What a rank did by itself, before there was a group, need not be alike.
            together = frame.block.scalars["seconds"] >= self._since[rank]
            begin = 0
            for number, row in enumerate(map(int, outer), count):
                self._note(frame, np.flatnonzero(together[begin:row]) + begin)
                if together[row]:
                    self._stepped(frame, row, number)
                begin = row + 1
            self._note(frame, np.flatnonzero(together[begin:]) + begin)
            self._compare_complete()
        return iter(())

    def _note(self, frame: Frame, rows: Rows) -> None:
        if len(rows):
            self._windows.setdefault(frame.block.rank, Window()).note(frame, rows)

    def _stepped(self, frame: Frame, row: int, number: int) -> None:
        rank, block = frame.block.rank, frame.block
        self._waiting.setdefault(number, {})[rank] = State(
            names_of(frame),
            missing_to_nan(block.parameters["norm_before"][row]),
            missing_to_nan(block.parameters["gradient_norm"][row]),
            block.site(row),
            self._windows.pop(rank, Window()),
        )

    def _compare_complete(self) -> None:
        for number in sorted(self._waiting):
            if len(self._waiting[number]) < self._world and len(self._waiting) <= _BEHIND:
                break
            self._compare(number, self._waiting.pop(number))

    def _compare(self, number: int, states: Mapping[int, State]) -> None:
        if len(states) > 1:
            self._compare_settings(number, {rank: s.window for rank, s in states.items()})
            self._compare_weights(number, states)

    def _compare_settings(self, number: int, windows: Mapping[int, Window]) -> None:
        for course, compare in zip(self._settings, _SETTINGS, strict=True):
            difference = compare(number, windows)
            if isinstance(difference, Difference):
                course.differs(difference)
            elif difference:
                course.agrees()
        for layer in first_of(windows).statistics:
            if all(layer in window.statistics for window in windows.values()):
                self._compare_statistics(number, layer, windows)

    def _compare_statistics(self, number: int, layer: str, windows: Mapping[int, Window]) -> None:
        known = {rank: window.statistics[layer] for rank, window in windows.items()}
        odd, against = parted({rank: one.norm for rank, one in known.items()}, self._close)
        if not odd:
            return
        untrained = tuple(rank for rank, one in known.items() if one.untrained)
        spoken = first_of(windows).spoken.get(layer, layer)
        used = all(one.used for one in known.values())
        if used and untrained and len(untrained) < len(known):
            severity, ranks = Severity.WARNING, untrained
            text = (
                f"{spoken} normalises with running statistics that were never trained on "
                f"{ranks_of(untrained)}, and with trained ones elsewhere"
            )
        else:
            severity, ranks = Severity.INFO, odd
            text = (
                f"the running statistics of {spoken} on {ranks_of(odd)} are not rank {against}'s "
                f"(‖mean‖ {known[odd[0]].norm:.4g} against {known[against].norm:.4g}), as they are "
                "where each rank sees its own tasks; what rank 0 saves holds its own"
            )
        self._statistics.setdefault(
            severity,
            Difference(
                number,
                ranks,
                "running statistics",
                text,
                "for buffer in net.buffers():\n    torch.distributed.broadcast(buffer, src=0)",
                "support",
                layers=(layer,),
            ),
        )

    def _compare_weights(self, number: int, states: Mapping[int, State]) -> None:
        course, names = self._weights, first_of(states).names
        states = {rank: state for rank, state in states.items() if state.names == names}
        if len(states) < 2:
            return
        odd, against = parted({r: state.weights for r, state in states.items()}, self._alike)
        if not odd:
            course.averaged_now_and_then |= course.agreed and course.first is not None
            course.agreed, course.first = True, None
        elif course.first is None:
            course.first = self._first_difference(number, states, odd, against)
        gradients = {r: s.gradient for r, s in states.items() if s.gradient is not None}
        if len(gradients) > 1:
            course.gradients_differ = bool(parted(gradients, self._alike)[0])
            course.gradients_agreed |= not course.gradients_differ

    def _first_difference(
        self, number: int, states: Mapping[int, State], odd: tuple[int, ...], against: int
    ) -> Difference:
        names, site = states[against].names, states[odd[0]].site
        here, there = states[odd[0]].weights, states[against].weights
        columns = np.flatnonzero(~self._equal(here, there))
        column = int(columns[0])
        if not self._weights.agreed:
            reason, fix = "", _BROADCAST
        elif self._weights.gradients_differ:
            reason = f": the gradients of outer step {number - 1} were not averaged over the ranks"
            fix = _AVERAGE
        else:
            reason = f": outer step {number - 1} did something else with equal gradients"
            fix = "Give every rank the same outer optimizer, learning rate and schedule."
        return Difference(
            number,
            odd,
            "base weights",
            f"the base weights on {ranks_of(odd)} are not rank {against}'s {since(number)} "
            f"({names[column]} ‖w‖ {here[column]:.6g} against {there[column]:.6g}){reason}",
            fix,
            "outer",
            (Mark(site, f"{ranks_of(odd)} steps other weights than rank {against}"),)
            if site
            else (),
            tuple(dict.fromkeys(names[c].rpartition(".")[0] or names[c] for c in columns)),
            {"norm": float(here[column]), "norm_elsewhere": float(there[column])},
            follows=True,
        )

    def _equal(self, one: Array, other: Array) -> Flags:
        """``[P]`` whether norms are equal but for rounding; one near 0 against the model's."""
        with np.errstate(all="ignore"):
            size = np.fmax(np.abs(one), np.abs(other))
            floor = 1e-3 * np.sqrt(np.nansum(np.where(np.isfinite(size), size, 0.0) ** 2))
            close = np.abs(one - other) <= self.thresholds["rank-difference"] * np.fmax(size, floor)
        return np.asarray(close | (one == other) | (np.isnan(one) & np.isnan(other)))

    def _alike(self, one: Array, other: Array) -> bool:
        return len(one) == len(other) and bool(self._equal(one, other).all())

    def _close(self, one: float, other: float) -> bool:
        return self._alike(np.asarray([one]), np.asarray([other]))

    def finish(self) -> Iterator[Finding]:
        """One finding: what differed first."""
        for number in sorted(self._waiting):
            self._compare(number, self._waiting.pop(number))
        self._compare_leftover()
        found = [
            difference
            for difference in (
                *(course.difference for course in self._settings),
                self._statistics.get(Severity.WARNING),
                self._weights.difference,
            )
            if difference is not None
        ]
        found.sort(key=lambda difference: (difference.number, difference.follows))
        if found:
            yield self._first_of(found)
        elif Severity.INFO in self._statistics:
            yield self._describe(self._statistics[Severity.INFO], Severity.INFO, "")

    def _compare_leftover(self) -> None:
        """What no outer step followed: where it starts, and, with no outer step at all, the rest.

        Where a run only evaluates, ranks may well do so with different numbers of tasks.
        """
        starts = {
            rank: State(window.names, window.start, None, window.site, window)
            for rank, window in self._windows.items()
            if window.start is not None
        }
        numbers = {self._counts[rank] for rank in starts}
        if len(starts) > 1 and len(numbers) == 1:
            number = numbers.pop()
            if number == 0:
                self._compare_settings(0, {rank: s.window for rank, s in starts.items()})
            self._compare_weights(number, starts)

    def _first_of(self, found: list[Difference]) -> Finding:
        first, *later = found
        if self._weights.independent:
            rest = "; neither weights nor gradients are shared: are these runs independent?"
            return self._describe(first, Severity.INFO, rest)
        rest = "".join(f"; {one.what} differ {since(one.number)}" for one in later)
        return self._describe(first, self.severity, rest)

    def _describe(self, difference: Difference, severity: Severity, rest: str) -> Finding:
        layers = difference.layers
        return self.finding(
            difference.text + rest,
            severity=severity,
            rank=difference.ranks[0],
            layer=layers[0] if layers else None,
            layers=layers,
            phase=difference.phase,
            evidence={
                "quantity": difference.what,
                "outer_step": float(difference.number),
                "ranks": ", ".join(map(str, difference.ranks)),
                **difference.evidence,
            },
            marks=difference.marks,
            fix=difference.fix,
        )
