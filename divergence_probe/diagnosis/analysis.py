"""From blocks to the diagnosis: the same live and over a finished recording."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from divergence_probe.diagnosis.collector import Collector
from divergence_probe.diagnosis.diagnosis import Diagnosis, ExceptionReport, Verdict
from divergence_probe.diagnosis.root_cause import root_cause
from divergence_probe.record.schema import Block
from divergence_probe.rules.base import Rule
from divergence_probe.rules.engine import Engine
from divergence_probe.rules.finding import Finding, Severity
from divergence_probe.rules.registry import all_rules
from divergence_probe.rules.selection import Selection
from divergence_probe.thresholds import Thresholds

#: Rules whose finding is itself a divergence: something non-finite or unbounded was seen.
DIVERGED = frozenset({"NF001", "NF002", "NG001", "LG001", "MG002"})


#: How the reason begins that says the probe failed and watched no further.
SWITCHED_OFF = "The probe switched itself off"


class Analysis:
    """Feeds blocks to the rules and the collector; answers with a diagnosis at any time.

    Args:
        selection: which rules and findings count.
        thresholds: the numbers in force.
        rules: rule classes; all registered ones by default.
    """

    def __init__(
        self,
        selection: Selection | None = None,
        thresholds: Thresholds | None = None,
        rules: Iterable[type[Rule]] | None = None,
    ) -> None:
        self.engine = Engine(all_rules() if rules is None else rules, selection, thresholds)
        self.collector = Collector()
        self._finished = False

    def feed(self, block: Block) -> list[Finding]:
        """Take one block; returns findings of a kind not seen before."""
        self.collector.feed(block)
        return self.engine.feed(block)

    def finish(self) -> list[Finding]:
        """The run is over; rules that need the whole of it speak now, once."""
        if self._finished:
            return []
        self._finished = True
        return self.engine.finish()

    def diagnosis(
        self,
        *,
        overhead: float = 0.0,
        seconds: float = 0.0,
        exception: ExceptionReport | None = None,
        script_exit: int = 0,
        recording: str | None = None,
        title: str | None = None,
        incomplete: Iterable[str] = (),
    ) -> Diagnosis:
        """The answer so far."""
        findings = self.engine.findings
        summary = self.collector.summary(overhead)
        reasons = dict.fromkeys((*summary.incomplete, *incomplete))
        return Diagnosis(
            verdict=self._verdict(findings, exception, reasons),
            summary=replace(summary, seconds=seconds, incomplete=tuple(reasons)),
            findings=findings,
            root_cause=root_cause(findings),
            norms=self.collector.norms(),
            batch_norm=self.collector.batch_norm(),
            health=self.collector.health(),
            exception=exception,
            script_exit=script_exit,
            recording=recording,
            title=title,
        )

    def _verdict(
        self,
        findings: tuple[Finding, ...],
        exception: ExceptionReport | None,
        incomplete: Iterable[str],
    ) -> Verdict:
        raised = exception is not None and exception.inner_loop
        if any(f.rule in DIVERGED and f.severity is Severity.ERROR for f in findings):
            return "diverged"
        if raised or any(f.severity > Severity.INFO for f in findings):
            return "suspect"
        if any(reason.startswith(SWITCHED_OFF) for reason in incomplete):
            return "unobserved"  # what was not watched to its end is never called healthy
        return "healthy" if self.collector.inner_steps else "unobserved"
