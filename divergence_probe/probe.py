"""``attach``: watch a loop from here on; the wiring of observe, record, rules and diagnosis."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ContextDecorator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from divergence_probe.diagnosis.analysis import SWITCHED_OFF, Analysis
from divergence_probe.diagnosis.diagnosis import Diagnosis, ExceptionReport
from divergence_probe.errors import DivergenceDetected, UsageError
from divergence_probe.ranks import Place, place
from divergence_probe.record.reader import Recording
from divergence_probe.record.schema import SCHEMA_VERSION, Block
from divergence_probe.record.writer import Writer
from divergence_probe.report.presented import PresentedDiagnosis
from divergence_probe.rules.finding import Finding, Severity
from divergence_probe.rules.registry import select as selected
from divergence_probe.rules.selection import Selection
from divergence_probe.thresholds import Thresholds
from divergence_probe.version import __version__

if TYPE_CHECKING:
    from torch import Tensor, nn

    from divergence_probe.observe.raised import InnerLines
    from divergence_probe.observe.session import Session
    from divergence_probe.observe.task import Task

Level = Literal["error", "warning"]


class Probe(ContextDecorator):
    """Watches inner loops between ``__enter__`` and ``__exit__``; see :func:`attach`."""

    def __init__(
        self,
        models: Iterable[nn.Module] = (),
        *,
        raise_on: Level | None = None,
        output: str | os.PathLike[str] | None = None,
        force: bool = False,
        selection: Selection | None = None,
        thresholds: Thresholds | None = None,
        on_finding: Callable[[Finding], None] | None = None,
        on_block: Callable[[Analysis], None] | None = None,
        meta: Mapping[str, Any] | None = None,
        inner: Iterable[Any] = (),
    ) -> None:
        self._models = tuple(models)
        self._inner = tuple(inner)
        self._raise_on = Severity.of(raise_on) if raise_on is not None else None
        self._output = Path(output) if output is not None else None
        self._force = force
        self._selection = selection
        self._thresholds = thresholds
        self._on_finding = on_finding
        self._on_block = on_block
        self._extra_meta = dict(meta or {})
        self._stack: list[_Watch] = []
        self._last: _Watch | None = None

    def __enter__(self) -> Self:
        watch = _Watch(self)
        watch.start(self._models)
        self._stack.append(watch)
        self._last = watch
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        watch = self._stack.pop()
        watch.stop(error)
        if error is None and self._raise_on is not None:
            watch.raise_if(self._raise_on)

    @property
    def diagnosis(self) -> PresentedDiagnosis:
        """The answer so far (or at the end): printable, also in a notebook, with ``to_dict()``."""
        return PresentedDiagnosis.of(self._current().diagnosis())

    @property
    def recording(self) -> Recording:
        """What was recorded so far, as tables: ``steps()``, ``batch_norm()``, ``tasks()``."""
        return self._current().recording()

    @property
    def failure(self) -> str | None:
        """What made the probe switch itself off during the run, or None."""
        session = self._current()._session
        return session.guard.failure if session is not None else None

    @property
    def session(self) -> Session:
        """What instruments report to; for interventions, which are put in next to them."""
        session = self._current()._session
        assert session is not None
        return session

    def task(self, name: str) -> AbstractContextManager[None]:
        """Say that what runs inside is one task, where that cannot be inferred.

        Args:
            name: a label for the recording's tasks.
        """
        from divergence_probe.observe import labels

        return labels.task(self._live(), name)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Say that what runs inside belongs to a phase.

        Args:
            name: ``"support"``, ``"query"`` or ``"meta-test"``.

        Raises:
            UsageError: for another name, on entering.
        """
        from divergence_probe.observe import labels

        return labels.phase(self._live(), name)

    def step(
        self,
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor] | None = None,
        *,
        loss: Tensor | float | None = None,
        learning_rate: float | None = None,
    ) -> None:
        """Record one inner step by hand, for updates that leave torch.

        Args:
            before: parameters before the step, by name.
            after: the same parameters after it.
            gradients: the gradients that were applied, by name; may lack some.
            loss: the loss they were taken of, a scalar.
            learning_rate: of the step.

        Raises:
            UsageError: where ``before`` and ``after`` differ in names.
        """
        from divergence_probe.observe import labels

        labels.step(self._live(), before, after, gradients or {}, loss, learning_rate)

    def _live(self) -> Session:
        session = self._current()._session
        if session is None:
            raise UsageError("The probe is not attached: use its labels inside the `with` block.")
        return session

    def _current(self) -> _Watch:
        if self._last is None:
            raise UsageError("The probe was never attached: use it as `with attach() as probe:`.")
        return self._last


def attach(
    *models: nn.Module,
    raise_on: Level | None = None,
    output: str | os.PathLike[str] | None = None,
    force: bool = False,
    select: str | Iterable[str] = (),
    ignore: str | Iterable[str] = (),
    intent: str | Iterable[str] = (),
    thresholds: Mapping[str, float] | None = None,
    on_finding: Callable[[Finding], None] | None = None,
    inner: Any = (),
) -> Probe:
    """Watch every inner loop that runs inside the ``with`` block (or the decorated function).

    Your numbers and random draws stay bit-identical, and nothing of the probe remains afterwards.

    Args:
        models: your models; optional, their names are found without.
        raise_on: ``"error"`` or ``"warning"``: raise :class:`DivergenceDetected` inside the loop
            as soon as a finding of that severity is made.
        output: folder of the recording; a temporary one, gone with the probe, by default.
        force: replace a recording already in ``output``.
        select: rule codes or prefixes to keep; ``CODE:GLOB`` for the layers that match.
        ignore: likewise to drop.
        intent: what is meant, so that it is not remarked on, such as ``"reptile"``.
        thresholds: overrides by name.
        on_finding: called with each finding of a new kind, as it is made.
        inner: optimizer (or several) whose steps are inner steps, where a loop that adapts a model
            in place never starts over and so looks like ordinary training.

    Raises:
        RecordingError: ``output`` cannot be written, or holds a recording already.
        UsageError: an unknown code, intent or threshold, a bad glob, or, on entering, what is no
            model.
        DivergenceDetected: with ``raise_on``, from inside the loop.
    """
    if raise_on not in (None, "error", "warning"):
        raise UsageError(f"attach(raise_on={raise_on!r}): choose 'error' or 'warning'.")
    return Probe(
        models,
        raise_on=raise_on,
        output=output,
        force=force,
        selection=selected(select, ignore, intent, "attach({}=...)"),
        thresholds=Thresholds(thresholds),
        on_finding=on_finding,
        inner=inner if isinstance(inner, list | tuple) else (inner,),
    )


class _Watch:
    """One stretch of watching: from one ``__enter__`` to its ``__exit__``."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._analysis = Analysis(probe._selection, probe._thresholds)
        self._session: Session | None = None
        self._observer: Any = None
        self._writer: Writer | None = None
        self._folder: Path | None = None
        self._lines: InnerLines | None = None
        self._place = Place()
        self._seconds = 0.0
        self._exception: ExceptionReport | None = None

    def start(self, models: Iterable[nn.Module]) -> None:
        # torch is imported here and not with the package: pytest imports the package on every run.
        from divergence_probe.observe.guard import Guard
        from divergence_probe.observe.observer import Observer
        from divergence_probe.observe.raised import InnerLines
        from divergence_probe.observe.session import Session

        _check_models(models)
        folder = self._probe._output
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="divergence-probe-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        folder = self._folder = folder.absolute()  # (the user may change directory)
        self._place = place()
        rank = self._place.rank
        self._writer = Writer(folder, self._meta(), rank, force=self._probe._force)
        self._lines = InnerLines()
        self._session = Session(self, Guard(), rank)
        self._session.rows.eager = self._probe._raise_on is not None
        self._session.inner = self._probe._inner
        for model in models:
            self._session.models.register(model)
        self._started = time.perf_counter()
        self._observer = Observer(self._session)
        self._observer.install()

    def block(self, block: Block) -> None:
        """Take a closed block from the session (it is the session's sink)."""
        assert self._writer is not None and self._session is not None and self._lines is not None
        self._lines.feed(block)
        self._writer.block(block, [x.to_json() for x in self._session.models.layouts])
        fresh = self._analysis.feed(block)
        for finding in fresh:
            if self._probe._on_finding is not None:
                self._probe._on_finding(finding)
        if self._probe._on_block is not None:
            self._probe._on_block(self._analysis)
        level = self._probe._raise_on
        if level is not None and any(f.severity >= level for f in fresh):
            self.raise_if(level)

    def raise_if(self, level: Severity) -> None:
        """Raise for findings of ``level`` or above."""
        findings = tuple(f for f in self._analysis.engine.findings if f.severity >= level)
        if findings:
            from divergence_probe.report import concise

            raise DivergenceDetected("\n" + concise.render(self.diagnosis()), findings)

    def stop(self, error: BaseException | None) -> None:
        session = self._session
        assert session is not None and self._writer is not None
        guard = session.guard
        if isinstance(error, DivergenceDetected | SystemExit):
            error = None
        level, self._probe._raise_on = self._probe._raise_on, None
        try:
            if guard.active:
                tasks, begun = list(session.open), session.tasks_begun
                with guard.work():
                    if isinstance(error, Exception):
                        session.cut_off()
                    session.close()
                with guard.work():
                    self._note_exception(error, tasks, late=session.tasks_begun > begun)
            elif guard.failure:
                with guard.work():  # what was seen before, where it can be measured
                    session.flush()
        finally:
            self._probe._raise_on = level
        self._observer.uninstall()
        self._seconds = time.perf_counter() - self._started
        if error is not None and self._exception is None:
            self._exception = ExceptionReport(type(error).__name__, _text(error), False)
        self._analysis.finish()
        self._note_failure()
        with guard.work():
            self._writer.close(
                {"seconds": self._seconds, "overhead_fraction": self._overhead(), **self._ending()}
            )
        self._note_failure()
        guard.active = False

    def _note_failure(self) -> None:
        """Say that the probe failed, where it did."""
        failure = self._session.guard.failure if self._session is not None else None
        if failure is not None:
            reason = f"{SWITCHED_OFF} during the run: {failure}."
            self._analysis.collector.incomplete.setdefault(reason)

    def _note_exception(self, error: BaseException | None, tasks: list[Task], late: bool) -> None:
        """Say what ended the block, and record it where it came out of an inner loop.

        Args:
            error: what ended it.
            tasks: those that were open then.
            late: whether the last one began with a gradient whose step was still to be seen.
        """
        from divergence_probe.observe.raised import examine
        from divergence_probe.rules.raised_explanations import explain

        session, lines = self._session, self._lines
        if error is None or session is None or lines is None:
            return
        raised = examine(error, session, lines, tasks)
        message = _text(error)
        known = explain(message, raised.module)
        # Ctrl-C lands anywhere, and says nothing of the loop it happens to land in.
        inner = isinstance(error, Exception) and (
            raised.place == "inside"
            or (known is not None and (known.inner or raised.place == "near"))
        )
        name = type(error).__name__
        self._exception = ExceptionReport(name, message, inner, raised.site)
        if inner:
            last = tasks[-1] if tasks and not late else None
            session.event(
                "raised",
                site=raised.number(session),
                type=name,
                message=message[:2000],
                inner_loop=True,
                own=raised.own,
                layer=raised.layer,
                module=raised.module,
                unused=list(raised.unused),
                none_used=raised.none_used,
                in_task=max(last.index if last is not None else lines.task, 0),
                at_step=last.steps if last is not None else lines.steps,
            )
            session.flush()

    def _ending(self) -> dict[str, Any]:
        exception = self._exception
        return {
            "exception": vars(exception) if exception is not None else None,
            "incomplete": list(self._analysis.collector.incomplete),
        }

    def diagnosis(self) -> Diagnosis:
        """The answer so far."""
        session = self._session
        if session is not None and session.guard.active:
            with session.guard.work():
                session.flush()
        output = self._probe._output
        return self._analysis.diagnosis(
            overhead=self._overhead(),
            seconds=self._seconds or time.perf_counter() - self._started,
            exception=self._exception,
            recording=str(output) if output is not None else None,
        )

    def recording(self) -> Recording:
        """The recording as it is on disk now."""
        session = self._session
        if session is not None and session.guard.active:
            with session.guard.work():
                session.flush()
        assert self._folder is not None
        return Recording(self._folder)

    def _overhead(self) -> float:
        if self._session is None:
            return 0.0
        seconds = self._seconds or time.perf_counter() - self._started
        return min(self._session.guard.spent / max(seconds, 1e-9), 1.0)

    def _meta(self) -> dict[str, Any]:
        import torch

        return {
            "schema_version": SCHEMA_VERSION,
            "tool_version": __version__,
            "argv": list(sys.argv),
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "started": time.time(),
            "complete": False,
            **({"world": self._place.world} if self._place.several else {}),
            **self._probe._extra_meta,
        }


def _text(error: BaseException) -> str:
    """What an exception says; nothing where saying it fails."""
    try:
        return str(error)
    except Exception:
        return ""


def _check_models(models: Iterable[object]) -> None:
    from torch import nn

    for model in models:
        if not isinstance(model, nn.Module):
            raise UsageError(
                f"attach() got {type(model).__name__}: give it models (torch.nn.Module), or none: "
                "it finds them by itself. Optimizers go to attach(inner=...)."
            )
