"""Train and eval mode: whether one task runs in one mode."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from divergence_probe.record.schema import QUERY, SUPPORT, Array, Flags
from divergence_probe.rules.base import Frame, Rule, TaskFacts
from divergence_probe.rules.finding import Finding, Mark, Severity
from divergence_probe.rules.quantities import farness
from divergence_probe.thresholds import Thresholds

#: By task: the row, the layers, and the mode they ran in before and in this row.
_Hits = dict[int, tuple[int, list[str], str, str]]
#: By row: the others.
_Found = dict[int, tuple[list[str], str, str]]

# What a batch leaves of the running statistics (torch's default momentum is 0.1), and what counts
# as little of those a task began with.
_MOMENTUM_LEFT, _LITTLE = 0.9, 0.1


class ModesDiffer(Rule):
    """Support and query of one task run in different modes.

    ## What it does
    Follows the mode BatchNorm and dropout layers really ran in, and reports a task whose support
    and query forwards differ in it. Containers' flags alone do not count.

    To train in train mode and to predict in eval mode is what everyone does, and test-time training
    with it: where no gradient is taken of the query, it is a remark, provided that the running
    statistics were trained (before the task, or by its own steps) and are close to those of the
    batch they normalise. An average of adapted weights uses no query.

    ## Why it is bad
    The weights were adapted under one normalisation and are judged under another.

    ## Example
    ```python
    fnet.train(); diffopt.step(loss(fnet(x_support), y_support))
    fnet.eval();  accuracy(fnet(x_query), y_query)
    ```

    ## Use instead
    One mode throughout the task; train mode is what the reference MAML does.

    ## References
    facebookresearch/higher#55; learnables/learn2learn#207.
    """

    code = "MODE001"
    name = "support-query-mode-mismatch"
    severity = Severity.WARNING
    cause = "train-eval-mismatch"

    def __init__(self, thresholds: Thresholds) -> None:
        super().__init__(thresholds)
        self._untrained: set[tuple[int, int]] = set()
        self._waiting: list[Finding] = []
        # of tasks before the first outer step, that began on untrained statistics
        self._fresh: list[Finding] | None = []
        # by rank and mode: where it was last switched to
        self._switched: dict[tuple[int, str], str] = {}
        self._begun_trained = False  # whether a later task began on trained statistics
        self._queries_trained = False

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding a task; a prediction's once it is known whether an outer step uses it."""
        found = {row: (layers, was, now) for row, layers, was, now in self._hits(frame).values()}
        self._note_untrained(frame)
        taken = frame.query & (frame.block.scalars["site"] >= 0)
        if found or self._waiting or self._fresh:
            yield from self._judged(frame, found, taken)
        else:
            self._note_queries(frame, taken)
        for task in frame.block.ended if self._untrained else ():
            self._untrained.discard((frame.block.rank, task))
        for event in frame.events("mode"):
            if event.site:
                self._switched[frame.block.rank, str(event.data.get("mode"))] = event.site

    def _switch_to(self, frame: Frame, row: int, mode: str) -> tuple[Mark, ...]:
        """The line that switched to the mode a row ran in."""
        until = frame.block.scalars["seconds"][row]
        sites = [
            event.site
            for event in frame.events("mode")
            if event.seconds <= until and event.data.get("mode") == mode and event.site
        ]
        site = sites[-1] if sites else self._switched.get((frame.block.rank, mode))
        return (Mark(site, f"{mode} mode from here on"),) if site else ()

    def _note_queries(self, frame: Frame, taken: Flags) -> None:
        """Whether the queries since the last outer step are trained on."""
        steps = np.flatnonzero(frame.outer)
        if len(steps):
            self._queries_trained, self._fresh = False, None
            taken = taken[steps[-1] :]
        self._queries_trained |= bool(taken.any())

    def _judged(self, frame: Frame, found: _Found, taken: Flags) -> Iterator[Finding]:
        """What was found, in order of time, and what waited for the outer steps in between."""
        for row in map(int, np.flatnonzero(frame.query | frame.outer)):
            if frame.outer[row]:
                yield from self._settled(frame, row)
                continue
            self._queries_trained |= bool(taken[row])
            if row not in found:
                continue
            finding = self._describe(frame, row, *found[row])
            if taken[row] or not self._predicts(frame, row, found[row][0]):
                yield finding
            elif not self._is_untrained(frame, row):
                self._begun_trained |= (frame.block.rank, finding.task) not in self._untrained
                self._waiting.append(finding)
            elif self._fresh is None:
                yield finding
            else:
                self._fresh.append(finding)

    def _note_untrained(self, frame: Frame) -> None:
        """Tasks that began on statistics no batch had been seen by."""
        norm = frame.block.batch_norm
        fresh = ((norm["bn_untrained"] == 1) & (norm["bn_training"] >= 1)).any(1)
        for row in np.flatnonzero(fresh & frame.begins):
            self._untrained.add((frame.block.rank, int(frame.task[row])))

    def _predicts(self, frame: Frame, row: int, layers: list[str]) -> bool:
        """Whether a query in eval mode after adapting in train mode is what everyone does."""
        layout, norm = frame.block.layout, frame.block.batch_norm
        drops = [i for i, name in enumerate(layout.dropouts) if name in layers]
        if (frame.block.dropout[row, drops] > 0).any():
            return False
        columns = [i for i, name in enumerate(layout.batch_norms) if name in layers]
        if (norm["bn_training"][row, columns] > 0).any() or (norm["bn_untrained"][row] == 1).any():
            return False
        return not (farness(frame, self.thresholds)[row, columns] > 1).any()

    def _is_untrained(self, frame: Frame, row: int) -> bool:
        """Whether a query's task began on untrained statistics and did not train them itself."""
        left = _MOMENTUM_LEFT ** int(frame.step[row])
        return (frame.block.rank, int(frame.task[row])) in self._untrained and left > _LITTLE

    def _settled(self, frame: Frame, row: int) -> Iterator[Finding]:
        """Give out what waited: predictions, or what an outer step used after all.

        An average of weights (Reptile, federated averaging) uses no query. It takes the statistics
        along: untrained ones in the first round only are how everyone begins.
        """
        averaged = bool(frame.flagged("incomplete")[row])
        used = not averaged and not self._queries_trained
        waiting, fresh = self._waiting, self._fresh or []
        self._waiting, self._fresh, self._queries_trained = [], None, False
        for finding in fresh:
            yield replace(finding, severity=Severity.INFO) if averaged else finding
        for finding in waiting:
            yield finding if used else replace(finding, severity=Severity.INFO)

    def finish(self) -> Iterator[Finding]:
        """What no outer step followed were predictions.

        Models that keep statistics of their own (each client has one) begin with untrained ones.
        """
        for finding in self._fresh or []:
            yield replace(finding, severity=Severity.INFO) if self._begun_trained else finding
        for finding in self._waiting:
            yield replace(finding, severity=Severity.INFO)

    def _hits(self, frame: Frame) -> _Hits:
        hits: _Hits = {}
        for names, values in (
            (frame.block.layout.batch_norms, frame.block.batch_norm["bn_training"]),
            (frame.block.layout.dropouts, frame.block.dropout),
        ):
            called = (values >= 0) & ~frame.outer[:, None]
            if not called.any():
                continue
            told = _may_differ(frame, values, called)
            for row in map(int, np.flatnonzero(called.any(1) & told)):
                phase = int(frame.block.scalars["phase"][row])
                facts = frame.tasks.get(int(frame.task[row]))
                if facts is None:
                    continue
                for column in np.flatnonzero(values[row] >= 0):
                    self._compare(facts, phase, names[column], values[row, column], row, hits)
        return hits

    @staticmethod
    def _compare(
        facts: TaskFacts, phase: int, layer: str, mode: float, row: int, hits: _Hits
    ) -> None:
        modes = facts.modes
        if phase == SUPPORT:
            modes[SUPPORT, layer] = mode
            return
        adapted = modes.get((SUPPORT, layer))
        if adapted is None or adapted == mode or modes.get((QUERY, layer)) == mode:
            return
        modes[QUERY, layer] = mode
        entry = hits.setdefault(facts.index, (row, [], _word(adapted), _word(mode)))
        entry[1].append(layer)

    def _describe(self, frame: Frame, row: int, layers: list[str], was: str, now: str) -> Finding:
        finding = self.at(
            frame,
            row,
            f"{frame.called(layers[:1])} ran in {was} mode on the support set and in {now} mode "
            "on the query",
            f"query in {now} mode, after adapting in {was} mode",
            layer=layers[0],
            layers=tuple(layers),
            evidence={"support": was, "query": now},
            fix="Use one mode for support and query; call .train()/.eval() on the fast model "
            "itself, once, before the inner loop.",
        )
        return replace(finding, marks=(*self._switch_to(frame, row, now), *finding.marks))


def _may_differ(frame: Frame, modes: Array, called: Flags) -> Flags:
    """``[S]`` rows of tasks that do not run in one mode, or not in this block alone."""
    by_task, ended = frame.by_task, frame.block.ended
    highest = by_task.reduced(np.maximum, np.where(called, modes, -np.inf))
    lowest = by_task.reduced(np.minimum, np.where(called, modes, np.inf))
    chosen = np.asarray((highest > lowest).any(1))
    for position, index in enumerate(by_task.tasks):
        facts = frame.tasks.get(index)
        if facts is not None and (facts.modes or index not in ended):
            chosen[position] = True
    return np.asarray(chosen[by_task.of_row])


def _word(mode: float) -> str:
    return {0.0: "eval", 1.0: "train"}.get(mode, "mixed")


class DropoutWhileEvaluating(Rule):
    """Dropout is active while adapting and predicting in a task no outer step follows.

    ## What it does
    Notes dropout layers that drop in the query forward of an evaluated task.

    ## Why it is bad
    It may be meant (Monte-Carlo dropout); otherwise predictions are random and lower than they
    could be.

    ## Example
    ```python
    fnet.train()             # for BatchNorm's sake; dropout comes with it
    accuracy(fnet(x_query), y_query)
    ```

    ## Use instead
    ```python
    for module in fnet.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    ```

    ## References
    Gal and Ghahramani, Dropout as a Bayesian approximation, 2016.
    """

    code = "MODE003"
    name = "dropout-in-evaluation"
    severity = Severity.INFO

    def __init__(self, thresholds: Thresholds) -> None:
        super().__init__(thresholds)
        self._waiting: dict[int, Finding] = {}

    def check(self, frame: Frame) -> Iterator[Finding]:
        """Remember tasks with active dropout; an outer step makes them training."""
        hit = frame.query & (frame.block.dropout == 1).any(1)
        trained = [event.seconds for event in frame.events("outer-step")]
        if trained:
            self._waiting.clear()
            hit &= frame.block.scalars["seconds"] > max(trained)
        for row in frame.first_rows(hit):
            layers = tuple(
                frame.block.layout.dropouts[c]
                for c in np.flatnonzero(frame.block.dropout[row] == 1)
            )
            self._waiting[int(frame.task[row])] = self.at(
                frame,
                row,
                f"{frame.called(layers[:1])} drops activations in the query of an evaluated task",
                "dropout is active here",
                layer=layers[0],
                layers=layers,
            )
        return iter(())

    def finish(self) -> Iterator[Finding]:
        """What no outer step followed was evaluation."""
        yield from self._waiting.values()
