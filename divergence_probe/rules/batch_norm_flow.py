"""How BatchNorm statistics flow between tasks, modes and calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from divergence_probe.record.schema import MISSING, Array, Event, Flags
from divergence_probe.rules.base import Frame, Rule
from divergence_probe.rules.finding import Finding, Mark, Severity
from divergence_probe.rules.outer_times import OuterTimes
from divergence_probe.thresholds import Thresholds


@dataclass(frozen=True)
class _Moved:
    """The task that moved a layer's statistics last.

    Attributes:
        task: which.
        start: the running mean's norm when it began.
        seconds: when it moved them first.
        finding: what there is to say of it.
    """

    task: int
    start: float
    seconds: float
    finding: Finding


class RunningStatisticsLeak(Rule):
    """Adapting to one task changes the base model's BatchNorm statistics for the next.

    ## What it does
    Follows each layer's running statistics from task to task: where a task's support forwards moved
    buffers that are the base model's own, and the next task starts from the moved ones although the
    weights start over, statistics leak. Where only what the model is given is adapted (attacked,
    say), and outer steps come in between, its statistics are in training: then it is a remark.

    ## Why it is bad
    Tasks are no longer independent, and test data ends up in the model that is tested.

    ## Example
    ```python
    functional_call(net, fast, (x,))                    # moves net's own buffers
    ```

    ## Use instead
    ```python
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    functional_call(net, (fast, buffers), (x,))
    ```

    ## References
    pytorch/pytorch#77133; learn2learn's clone_module shares buffers, higher clones them.
    """

    code = "BN003"
    name = "running-stats-leak"
    severity = Severity.WARNING
    cause = "running-stats-leak"

    def __init__(self, thresholds: Thresholds) -> None:
        super().__init__(thresholds)
        self._moved: dict[tuple[object, str], _Moved] = {}
        # the task that began last, and each layer's running mean before its first forward
        self._starts: dict[object, tuple[int, Array]] = {}
        self._weights: dict[object, tuple[int, Array]] = {}
        self._carried: dict[tuple[object, int], bool] = {}
        self._stepped = OuterTimes()

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding a task that starts from statistics another task moved."""
        norm = frame.block.batch_norm
        shared = (norm["bn_shared"] == 1) & (norm["bn_training"] >= 1)
        self._stepped.note(frame)
        if shared.size:
            self._note_weights(frame)
        if shared.any():
            rows = np.flatnonzero(frame.begins | (frame.support & shared.any(1)))
        else:  # of tasks that move nothing only the latest one's start is kept
            rows = np.flatnonzero(frame.begins)[-1:]
        for row in rows:
            task = int(frame.task[row])
            if frame.begins[row]:
                layout = (frame.block.rank, frame.block.layout.index)
                self._starts[layout] = (task, norm["bn_running_mean_before"][row].copy())
            for column in np.flatnonzero(shared[row]):
                yield from self._layer(frame, int(row), int(column), task)

    def _note_weights(self, frame: Frame) -> None:
        """Whether each task's weights go on from the task before (then its statistics may too)."""
        layout = (frame.block.rank, frame.block.layout.index)
        after = frame.block.parameters["norm_after"]
        rows = np.flatnonzero(frame.support)
        if not len(rows):
            return
        # the task of the row before, and how its weights came out
        nobody = (-1, np.full(after.shape[1], np.nan))
        last, ended = self._weights.get(layout, nobody)
        tasks = frame.task[rows]
        new = np.flatnonzero(np.diff(tasks, prepend=last))
        ends = np.concatenate([ended[None], after[rows]])[new]
        starts = frame.block.parameters["norm_before"][rows[new]]
        with np.errstate(all="ignore"):
            close = np.abs(ends - starts) <= 1e-6 * np.abs(starts)
        close &= np.isfinite(starts)
        carried = (close | (ends == starts) | (np.isnan(ends) & np.isnan(starts))).all(1)
        carried &= (new > 0) | (last >= 0)
        for task, goes_on in zip(tasks[new].tolist(), carried.tolist(), strict=True):
            self._carried[layout, int(task)] = goes_on
        self._weights[layout] = (int(tasks[-1]), after[rows[-1]].copy())

    def _start(self, frame: Frame, row: int, column: int, task: int) -> float | None:
        """A layer's running mean before the task's first forward; None where that was not kept.

        (Not before the first one whose buffers are known as the base's: a copy that is used for
        task after task is met as such only after its first step.)
        """
        known = self._starts.get((frame.block.rank, frame.block.layout.index))
        if known is None or known[0] != task:
            return None
        if column < len(known[1]) and (start := float(known[1][column])) != MISSING:
            return start
        return float(frame.block.batch_norm["bn_running_mean_before"][row, column])

    def _layer(self, frame: Frame, row: int, column: int, task: int) -> Iterator[Finding]:
        layer = frame.normalization(column)
        layout = (frame.block.rank, frame.block.layout.index)
        start = self._start(frame, row, column, task)
        if start is None:
            return
        end = float(frame.block.batch_norm["bn_running_mean_after"][row, column])
        previous = self._moved.get((layout, layer))
        if previous is not None and previous.task != task:
            if previous.start != start and not self._carried.get((layout, task), False):
                yield self._said_of(frame, row, task, previous)
            previous = None
        if previous is None and start != end:
            seconds = float(frame.block.scalars["seconds"][row])
            found = self._describe(frame, row, column)
            self._moved[layout, layer] = _Moved(task, start, seconds, found)

    def _said_of(self, frame: Frame, row: int, task: int, previous: _Moved) -> Finding:
        """A remark where the weights do not start over either, but are moved on (Reptile).

        Likewise where the model is in training itself, and only what it is given is adapted.
        """
        facts = frame.tasks.get(task)
        meant = facts is not None and bool(facts.data.get("moved_on"))
        if frame.is_nameless:
            now = frame.block.scalars["seconds"][row : row + 1]
            meant |= bool(self._stepped.between(frame, np.array([previous.seconds]), now)[0])
        return replace(previous.finding, severity=Severity.INFO) if meant else previous.finding

    def _describe(self, frame: Frame, row: int, column: int) -> Finding:
        drift = float(frame.block.batch_norm["bn_drift"][row, column])
        layer = frame.normalization(column)
        return self.at(
            frame,
            row,
            f"{frame.called([layer])}: adapting to this task moves the base model's running "
            f"statistics ({drift:.2g} σ a forward), and the next task starts from them",
            "this forward moves the base model's BatchNorm buffers",
            layer=layer,
            layers=(layer,),
            evidence={"drift": drift},
            fix="buffers = {name: b.clone() for name, b in net.named_buffers()}  # a copy for each "
            "task",
        )


class TransductiveStatistics(Rule):
    """Predictions at meta-test use the query batch's own statistics.

    ## What it does
    Notes BatchNorm in train mode in the query forward of a task no outer step follows, and says
    whether statistics pass from task to task.

    ## Why it is bad
    It may be meant: the reference MAML does it. But a prediction then depends on the other samples
    of its batch, and accuracies are not comparable with inductive ones.

    ## Example
    ```python
    net.train(); accuracy(fnet(x_query), y_query)
    ```

    ## Use instead
    Report it as transductive, or normalise the query with the support set's statistics.

    ## References
    facebookresearch/higher#107; Bronskill et al., TaskNorm, 2020.
    """

    code = "BN005"
    name = "transductive-batch-statistics"
    severity = Severity.INFO
    cause = "transductive-batch-statistics"

    def __init__(self, thresholds: Thresholds) -> None:
        super().__init__(thresholds)
        self._waiting: dict[int, Finding] = {}

    def check(self, frame: Frame) -> Iterator[Finding]:
        """Remember transductive queries; an outer step makes them training."""
        norm = frame.block.batch_norm
        rows, steps = np.flatnonzero(frame.query), np.flatnonzero(frame.outer)
        if len(steps):
            self._waiting.clear()
            rows = rows[rows > steps[-1]]
        hit = (norm["bn_training"][rows] >= 1) & (norm["bn_shared"][rows] >= 0)
        for row, layers in zip(rows.tolist(), hit, strict=True):
            if layers.any() and int(frame.task[row]) not in self._waiting:
                self._waiting[int(frame.task[row])] = self._describe(frame, row, layers)
        return iter(())

    def _describe(self, frame: Frame, row: int, hit: Flags) -> Finding:
        columns = np.flatnonzero(hit)
        layers = tuple(frame.normalization(int(c)) for c in columns)
        shared = bool((frame.block.batch_norm["bn_shared"][row, columns] == 1).any())
        spoken = frame.called(layers[:1])
        passing = "pass on to the next task" if shared else "do not pass from task to task"
        return self.at(
            frame,
            row,
            f"{spoken} normalises the query with the query batch's own statistics; "
            f"running statistics {passing}",
            "query predicted in train mode",
            layer=layers[0],
            layers=layers,
            evidence={"statistics_pass_between_tasks": float(shared)},
        )

    def finish(self) -> Iterator[Finding]:
        """What no outer step followed was evaluation."""
        yield from self._waiting.values()


class DoubleUpdate(Rule):
    """Running statistics move twice for one forward.

    ## What it does
    Notices a BatchNorm layer in train mode that runs inside a backward: activation checkpointing
    runs the forward again there, and the statistics move again.

    ## Why it is bad
    The effective momentum doubles, and the second move sees weights of another moment.

    ## Example
    ```python
    h = checkpoint(self.block, x, use_reentrant=False)     # block holds a BatchNorm
    ```

    ## Use instead
    Keep BatchNorm out of the checkpointed region, or use GroupNorm in it.

    ## References
    pytorch/pytorch#62471.
    """

    code = "BN006"
    name = "running-stats-move-twice"
    severity = Severity.WARNING
    cause = "double-bn-update"

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding a layer and task."""
        tasks: dict[int, list[Event]] = {}
        for event in frame.events("recomputed"):
            tasks.setdefault(event.task, []).append(event)
        order = {name: i for i, name in enumerate(frame.block.layout.batch_norms)}
        for task, events in tasks.items():
            # A backward meets the last layer first; the report names the first in forward order.
            events.sort(key=lambda event: order.get(str(event.data.get("layer")), len(order)))
            layers = tuple(str(e.data["layer"]) for e in events if e.data.get("layer"))
            first = events[0]
            spoken = frame.called(layers[:1]) if layers else "a BatchNorm layer"
            yield self.finding(
                f"{spoken} runs again inside the backward: its "
                "running statistics move twice a forward",
                task=task if task >= 0 else None,
                layer=layers[0] if layers else None,
                layers=layers,
                marks=(Mark(first.site, "recomputes a forward with BatchNorm"),)
                if first.site
                else (),
                fix="Leave BatchNorm out of the checkpointed block, or use nn.GroupNorm in it.",
            )


class ModeNotPropagated(Rule):
    """A mode was switched on the base model while the fast model kept its own.

    ## What it does
    Notes ``.train()`` or ``.eval()`` on the base model after a task has begun, and a layer of the
    fast model that runs in the other mode afterwards.

    ## Why it is bad
    ``fnet.training`` is a copy: the switch does not reach it, and nothing says so.

    ## Example
    ```python
    with higher.innerloop_ctx(net, opt) as (fnet, diffopt):
        net.eval()                 # fnet stays in train mode
        fnet(x_query)
    ```

    ## Use instead
    ```python
        fnet.eval()
    ```

    ## References
    learnables/learn2learn#396.
    """

    code = "MODE002"
    name = "mode-not-propagated"
    severity = Severity.WARNING
    cause = "mode-not-propagated"

    def __init__(self, thresholds: Thresholds) -> None:
        super().__init__(thresholds)
        self._switched: dict[int, tuple[float, float, str | None]] = {}

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding a task whose layers ran in the mode that was switched off."""
        for event in frame.events("mode"):
            if event.task < 0:
                continue
            if event.data.get("target") == "fast":
                self._switched.pop(event.task, None)
            elif event.data.get("mode") != event.data.get("was"):
                mode = 1.0 if event.data.get("mode") == "train" else 0.0
                # The first switch is the one that was meant; a later one only takes it back.
                self._switched.setdefault(event.task, (mode, event.seconds, event.site))
        seconds = frame.block.scalars["seconds"]
        modes = (
            (frame.block.layout.batch_norms, frame.block.batch_norm["bn_training"]),
            (frame.block.layout.dropouts, frame.block.dropout),
        )
        for row in np.flatnonzero(self._of_switched(frame)).tolist():
            switched = self._switched.get(int(frame.task[row]))
            if switched is None or seconds[row] < switched[1]:
                continue
            for names, values in modes:
                kept = np.flatnonzero((values[row] >= 0) & (values[row] != switched[0]))
                if len(kept):
                    layers = tuple(names[int(c)] for c in kept)
                    yield self._describe(frame, row, layers, *switched)
                    self._switched.pop(int(frame.task[row]), None)
                    break

    def _of_switched(self, frame: Frame) -> Flags:
        """``[S]`` rows of tasks in which a mode was switched."""
        tasks = frame.by_task.tasks if self._switched else ()
        switched = np.asarray([task in self._switched for task in tasks], dtype=bool)
        return switched[frame.by_task.of_row] if switched.any() else np.zeros(0, bool)

    def _describe(
        self,
        frame: Frame,
        row: int,
        layers: tuple[str, ...],
        mode: float,
        _: float,
        site: str | None,
    ) -> Finding:
        word, other = ("train", "eval") if mode else ("eval", "train")
        finding = self.at(
            frame,
            row,
            f".{word}() was called on the base model during the task; "
            f"{frame.called(layers[:1])} of the fast model still runs in {other} mode",
            f"the fast model still runs in {other} mode here",
            layer=layers[0],
            layers=layers,
            evidence={"called": word, "runs_in": other},
            fix=f"fnet.{word}()   # on the fast model itself",
        )
        marks = (Mark(site, f".{word}() reaches the base only"),) if site else ()
        return self.finding(
            finding.message,
            **{
                name: getattr(finding, name)
                for name in ("task", "step", "phase", "layer", "layers", "evidence", "fix", "rank")
            },
            marks=(*marks, *finding.marks),
        )
