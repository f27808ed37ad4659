"""What ``probe run`` does: watch a script, judge it, report, and choose the exit code."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from divergence_probe import recording_folder, runner
from divergence_probe.commands.options import Destination, Judgement
from divergence_probe.errors import ProbeError, UsageError, fault_of_ours
from divergence_probe.progress import ProgressLine
from divergence_probe.ranks import Place, place
from divergence_probe.terminal import wants_color, width_of

if TYPE_CHECKING:
    from divergence_probe.diagnosis.diagnosis import Diagnosis
    from divergence_probe.probe import Probe

FINDING = 1
FAILED = 2
UNOBSERVED = 5

#: Ranks end together but for what the last of them still has to write.
_SECONDS_FOR_OTHERS = 30.0


@dataclass(frozen=True)
class RunOptions:
    """Everything ``probe run`` was asked for, checked.

    Attributes:
        target: the script or module with its arguments.
        judgement: which findings count and which fail the run.
        destinations: where reports go; paths absolute, None for stderr.
        output: folder of the recording; None for a new one under ``.probe/``.
        force: replace a recording that is there.
        confirm: re-run under interventions to prove the cause.
        confirm_timeout: seconds for one of these re-runs.
        inner_optimizer: name of the script's variable that holds the inner optimizer.
    """

    target: runner.Target
    judgement: Judgement
    destinations: tuple[Destination, ...] = field(default=(("rich", None),))
    output: Path | None = None
    force: bool = False
    confirm: bool = False
    confirm_timeout: float | None = None
    inner_optimizer: str | None = None

    @cached_property
    def title(self) -> str:
        """The script's file name, or the module's name; of before the script went elsewhere."""
        target = self.target
        return target.module or Path(os.path.abspath(target.script or "")).name


def watch(options: RunOptions) -> int:
    """Run and report; returns the exit code of the contract.

    Raises:
        ProbeError: something asked for cannot be done; the script has not run.
    """
    try:
        runner.check(options.target)
    except runner.TargetError as error:
        raise UsageError(str(error)) from error
    warm_up(options.destinations)
    name = Path(options.title).stem if options.target.script else options.title
    own = place()
    folder = recording_folder.prepare(options.output, name, force=options.force, place=own)
    return _WatchedRun(options, folder, own).run()


def warm_up(destinations: tuple[Destination, ...]) -> None:
    """Render nothing in each format: what it imports must not come from the script's folder."""
    from divergence_probe.diagnosis.diagnosis import Diagnosis, Summary
    from divergence_probe.report import registry

    for name, _ in destinations:
        try:
            registry.render(name, Diagnosis("healthy", Summary()))
        except ProbeError:
            raise
        except Exception as error:
            raise UsageError(
                f"--report {name}: this format does not work here: {type(error).__name__}: {error}."
            ) from error


class _WatchedRun:
    """One run: the probe around the script, and what follows once that has ended."""

    def __init__(self, options: RunOptions, folder: Path, own: Place) -> None:
        from divergence_probe.probe import Probe
        from divergence_probe.thresholds import Thresholds

        judgement = options.judgement
        self._options = options
        self._folder = folder
        self._place = own
        self._label = _label(folder)
        self._failures: list[str] = []
        self._stderr = sys.stderr
        self._directory = os.getcwd()  # the script may change it
        self._started = time.perf_counter()
        self._progress = ProgressLine()
        self._probe: Probe = Probe(
            inner=(options.inner_optimizer,) if options.inner_optimizer else (),
            output=folder,
            selection=judgement.selection,
            thresholds=Thresholds(judgement.thresholds),
            on_block=self._progress.update if own.leads else None,
            meta={
                "title": options.title,
                "judgement": {**asdict(judgement.selection), "thresholds": judgement.thresholds},
            },
        )

    def run(self) -> int:
        """Run the script, then say what was seen."""
        try:
            outcome = runner.run(self._options.target, around=self._around)
        except runner.TargetError as error:
            raise UsageError(str(error)) from error
        finally:
            self._progress.close()
        try:
            code = self._conclude(outcome)
        except ProbeError as error:
            self._say(f"probe: {error}")
            code = FAILED
        except Exception as error:  # noqa: BLE001 - the script's exit code must get through
            self._say(f"probe: The report failed. {fault_of_ours(error)}")
            if self._is_kept:
                self._say(f"probe: The recording is kept: probe report {self._label}")
            code = FAILED
        return outcome.exit_code or code

    @contextlib.contextmanager
    def _around(self) -> Iterator[None]:
        try:
            self._probe.__enter__()
        except ImportError as error:
            raise UsageError(
                f"The probe cannot be attached: {error}. Install the project and torch into the "
                f"environment of {sys.executable}."
            ) from error
        if self._place.leads:
            self._progress.start()
        try:
            yield
        except BaseException as error:
            self._detach(error)
            raise
        self._detach(None)

    def _detach(self, error: BaseException | None) -> None:
        self._progress.close()
        try:
            self._probe.__exit__(type(error) if error is not None else None, error, None)
        except Exception as failure:  # noqa: BLE001 - never in place of the script's own ending
            self._failures.append(f"The recording was not finished: {failure}")

    def _conclude(self, outcome: runner.Outcome) -> int:
        from divergence_probe.report import registry

        diagnosis: Diagnosis = replace(
            self._probe.diagnosis,
            script_exit=outcome.exit_code,
            title=self._options.title,
            recording=self._label if self._is_kept else None,
        )
        if self._probe.failure is not None:
            self._failures.append(f"The probe switched itself off: {self._probe.failure}")
        if not self._is_kept:
            self._failures.append(
                f"The folder of the recording, {self._label}, was removed during the run: nothing "
                "of it is kept. The report is of what was seen."
            )
        if not self._place.leads:
            return self._follow(outcome, diagnosis)
        if self._is_kept:
            diagnosis = self._stored(diagnosis)
        self._explain(outcome, diagnosis)
        if self._options.confirm:
            diagnosis = self._confirm(diagnosis)
        stream = self._stream()
        with contextlib.suppress(OSError):  # nobody to show it to is no failure: files are written
            registry.write(
                diagnosis,
                self._options.destinations,
                stream,
                width=width_of(stream),
                color=wants_color(stream),
            )
        for failure in self._failures:
            self._say(f"probe: {failure}")
        return self._code(diagnosis)

    @cached_property
    def _is_kept(self) -> bool:
        """Whether the script has left the recording where it is; asked once that has ended."""
        return recording_folder.is_kept(self._folder, self._place)

    def _stored(self, diagnosis: Diagnosis) -> Diagnosis:
        """The diagnosis, of all ranks where there are several, once it is in the recording."""
        from divergence_probe.stored import write_ending

        if self._place.several:
            diagnosis = self._of_all_ranks(diagnosis)
        try:
            write_ending(self._folder, diagnosis)
        except ProbeError as error:
            self._failures.append(str(error))
        return diagnosis

    def _follow(self, outcome: runner.Outcome, diagnosis: Diagnosis) -> int:
        """Leave the reports to rank 0; it may not live to write them where this rank failed.

        Whatever was found, this rank ends well: a launcher stops the others where one does not.
        """
        if outcome.exit_code:
            from divergence_probe.report import registry

            self._explain(outcome, diagnosis)
            with contextlib.suppress(OSError):
                registry.write(diagnosis, (("concise", None),), self._stream(), width=80)
        for failure in self._failures:
            self._say(f"probe: rank {self._place.rank}: {failure}")
        return 0

    def _of_all_ranks(self, own: Diagnosis) -> Diagnosis:
        """Judge what all ranks recorded, once they have ended, side by side."""
        from divergence_probe.record.reader import Recording
        from divergence_probe.replay import replay

        self._wait_for_others()
        judgement = self._options.judgement
        merged = replay(Recording(self._folder), judgement.selection, judgement.thresholds)
        return replace(
            merged,
            summary=replace(merged.summary, seconds=own.summary.seconds),
            exception=own.exception or merged.exception,
            script_exit=own.script_exit,
            title=own.title,
            recording=own.recording,
        )

    def _wait_for_others(self) -> None:
        """Until every rank that records has finished its recording, but not for ever."""
        from divergence_probe.record.reader import Recording

        recording = Recording(self._folder)
        until = time.perf_counter() + _SECONDS_FOR_OTHERS
        while time.perf_counter() < until:
            if all(recording.rank_meta(rank).get("complete") for rank in recording.ranks[1:]):
                return
            time.sleep(0.05)

    def _confirm(self, diagnosis: Diagnosis) -> Diagnosis:
        """Run again under interventions; Ctrl-C leaves the cause inferred and the report whole."""
        from divergence_probe import confirmation
        from divergence_probe.record.reader import Recording
        from divergence_probe.rules.selection import Selection
        from divergence_probe.stored import write_ending

        if self._place.several:
            self._say(
                "probe: --confirm runs the script again by itself, which cannot be done with one "
                "of several ranks: nothing was run again."
            )
            return diagnosis
        if not self._is_kept:
            self._say("probe: --confirm needs the recording, which is gone: nothing was run again.")
            return diagnosis
        options, judgement = self._options, self._options.judgement
        seconds = time.perf_counter() - self._started
        common = confirmation.Rerun(
            options.target,
            self._directory,
            options.confirm_timeout or confirmation.default_timeout(seconds),
            Selection(intent=judgement.selection.intent),
            judgement.thresholds,
        )
        try:
            diagnosis = confirmation.confirmed(
                diagnosis, Recording(self._folder), common, lambda text: self._say(f"probe: {text}")
            )
            write_ending(self._folder, diagnosis)
        except KeyboardInterrupt:
            self._say("probe: --confirm was interrupted; the cause stays as inferred.")
        except Exception as error:  # noqa: BLE001 - the first run's report must come through
            self._failures.append(f"--confirm failed: {type(error).__name__}: {error}")
        return diagnosis

    def _explain(self, outcome: runner.Outcome, diagnosis: Diagnosis) -> None:
        from divergence_probe.explanation import explain

        text = explain(outcome.exception, diagnosis) if outcome.exception is not None else None
        if text:
            self._say(text)

    def _code(self, diagnosis: Diagnosis) -> int:
        if self._options.judgement.fails(diagnosis.findings):
            return FINDING
        if self._failures:
            return FAILED
        if diagnosis.summary.inner_steps:
            return 0
        self._advise(diagnosis)
        return UNOBSERVED

    def _advise(self, diagnosis: Diagnosis) -> None:
        """The terminal report has the advice already; the other formats leave it out."""
        if diagnosis.script_exit or ("rich", None) in self._options.destinations:
            return
        from divergence_probe.report.wording import UNOBSERVED_ADVICE

        self._say("probe: no inner loop was seen.\n" + "\n".join(UNOBSERVED_ADVICE))

    def _stream(self) -> TextIO:
        """The stderr of before the script, which may have closed or replaced it."""
        if self._stderr is None:  # closed from the start: what is number 2 now is another's file
            return io.StringIO()
        if not self._stderr.closed:
            return self._stderr
        try:
            return open(os.dup(2), "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        except OSError:
            return io.StringIO()

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            print(text, file=self._stream(), flush=True)


def _label(folder: Path) -> str:
    """The folder as a person in the present working directory would type it."""
    try:
        return str(folder.relative_to(Path.cwd()))
    except ValueError:
        return str(folder)
