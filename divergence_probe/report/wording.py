"""Words every format shares: safe text, counts, paths, and the facts of the header line."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from divergence_probe.diagnosis.diagnosis import Diagnosis, Intervention, Summary
from divergence_probe.report.numbers import brief
from divergence_probe.rules.finding import Finding, Mark, Severity

# Bidirectional overrides and isolates let a name look like another ("Trojan Source").
_DECEIVING = "\u200e\u200f\u202a-\u202e\u2066-\u2069"
_UNPRINTABLE = re.compile(
    f"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff{_DECEIVING}\ud800-\udfff]"
)
_VERDICT_MEANING = {
    "diverged": "an inner loop blew up",
    "suspect": "no blow-up, but something is wrong",
    "healthy": "no sign of divergence",
    "unobserved": "no inner step was seen",
}

#: Below this many seconds what is paid once outweighs every step.
SHORT_RUN = 3.0

#: What to try when nothing was seen; one sentence each.
UNOBSERVED_ADVICE = (
    "The probe sees an inner step when gradients are taken and weights rebuilt or updated from "
    "them while the script runs under `probe run`, or inside "
    "`with divergence_probe.attach(model):`.",
    "Check that the adaptation is reached at all: a data loader of length 0, a checkpoint that "
    "skips training, or `num_inner_steps=0` look just like this.",
    "Work done in another process (DataLoader workers, `mp.spawn`) is seen only when that process "
    "is watched too: call `divergence_probe.attach()` inside it; torchrun takes "
    "`-m divergence_probe run` before the script.",
    "A loop that adapts one model in place and never starts over looks like ordinary training: "
    "name its optimizer with `--inner-optimizer NAME`, or `attach(inner=optimizer)`.",
    "A step that torch.compile runs whole cannot be observed: run it once uncompiled.",
    "If your own update rule is not recognised, label it: `with probe.task(name):` around the "
    "inner loop and `probe.step(before, after)` at each step.",
)


def unseen(diagnosis: Diagnosis) -> str:
    """What an unobserved run leaves open, in a sentence; empty for others."""
    if diagnosis.verdict != "unobserved":
        return ""
    if diagnosis.summary.inner_steps:
        return "The run was not watched to its end, so nothing can be said about divergence."
    return "No inner step was seen, so nothing can be said about divergence."


def advice(diagnosis: Diagnosis) -> tuple[str, ...]:
    """What to try: where no inner step was seen, though the script came to its end."""
    seen_or_ended = diagnosis.summary.inner_steps or diagnosis.exception is not None
    return UNOBSERVED_ADVICE if diagnosis.verdict == "unobserved" and not seen_or_ended else ()


def visible(text: str) -> str:
    """``text`` with control, bidirectional and surrogate characters written out as escapes.

    Line feeds stay and tabs become four spaces; a name taken from a model can then neither move
    the cursor nor reorder a line.
    """
    text = text.replace("\r\n", "\n").replace("\t", "    ")
    return _UNPRINTABLE.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def one_line(text: str) -> str:
    """``text`` made visible, its line breaks and runs of blanks folded into single blanks."""
    return " ".join(visible(text).split())


def count_of(number: int, noun: str) -> str:
    """``"1 task"``, ``"10 tasks"``, ``"12,000 steps"``; the nouns used here all take an s."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def split_site(site: str) -> tuple[str, int | None]:
    """``"path:line"`` as ``(path, line)``; the line is None where the site names none."""
    path, colon, line = site.rpartition(":")
    if colon and line.isascii() and line.isdigit():
        return path, int(line)
    return site, None


def short_path(path: str) -> str:
    """``path`` relative to the working directory where it lies inside it, else as given."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except (ValueError, OSError):
        return path


def site_of(finding: Finding) -> str | None:
    """``path:line`` of the most telling line of a finding, its path made short, or None."""
    if not finding.marks:
        return None
    path, line = split_site(finding.marks[0].site)
    return short_path(path) if line is None else f"{short_path(path)}:{line}"


def verdict_meaning(diagnosis: Diagnosis) -> str:
    """The verdict in a few words."""
    if diagnosis.verdict == "unobserved" and diagnosis.summary.inner_steps:
        return "it was not watched to its end"
    return _VERDICT_MEANING[diagnosis.verdict]


def facts(diagnosis: Diagnosis) -> list[str]:
    """What was watched, in a few short phrases: the header line of every report."""
    summary = diagnosis.summary
    told = [one_line(diagnosis.title)] if diagnosis.title else []
    told += [count_of(summary.tasks, "task"), count_of(summary.inner_steps, "inner step")]
    if summary.adapters:
        told.append(", ".join(map(one_line, summary.adapters)))
    told += _optimizer(summary)
    if summary.ranks > 1:
        told.append(count_of(summary.ranks, "rank"))
    if diagnosis.script_exit and diagnosis.exception is None:
        told.append(f"exit code {diagnosis.script_exit}")
    if summary.overhead_fraction > 0 and not 0 < summary.seconds < SHORT_RUN:
        told.append(f"probe cost {100 * summary.overhead_fraction:.1f} %")
    return told


def _optimizer(summary: Summary) -> list[str]:
    names = ", ".join(map(one_line, summary.optimizers))
    rates = ""
    if summary.learning_rates is not None:
        low, high = summary.learning_rates
        rates = f"lr {low:g}" if low == high else f"lr {low:g} to {high:g}"
    told = f"{names} {rates}".strip()
    return [told] if told else []


def confidence_words(diagnosis: Diagnosis) -> str:
    """How sure the root cause is, and how to be surer; empty without a root cause."""
    from divergence_probe.diagnosis.confirm import PROOFS  # numpy comes with it

    cause = diagnosis.root_cause
    if cause is None:
        return ""
    if cause.confidence == "confirmed":
        return f"confirmed: {_proof(cause.cause, diagnosis.interventions)}"
    if diagnosis.interventions:
        return "inferred from the recording; the re-runs did not settle it"
    if cause.cause not in PROOFS or diagnosis.summary.ranks > 1:
        return "inferred from the recording"
    return "inferred from the recording; `probe run --confirm` re-runs the loop to prove it"


def _proof(cause: str, runs: Iterable[Intervention]) -> str:
    """Which re-runs, each with one thing changed, were stable, and what else was."""
    from divergence_probe.diagnosis.confirm import CONTROL, PROOFS

    stable = [run for run in runs if run.outcome == "stable" and run.name != CONTROL]
    own = [run for run in stable if run.name in PROOFS.get(cause, ())]
    if not own:
        return "changing this alone stopped it"
    ways = [_way(run) for run in own]
    proof = f"{ways[0]} alone stops it"
    if len(ways) > 1:
        proof = f"each of these alone stops it: {'; '.join(ways)}"
    control = next((run for run in runs if run.name == CONTROL), None)
    if control is not None and not math.isnan(control.largest_norm):
        proof += f" (largest norm {brief(control.largest_norm)} with nothing changed)"
    others = [one_line(run.name) for run in stable if run not in own]
    if others:
        proof += f"; stable too, but no better an explanation: {', '.join(others)}"
    return proof


def _way(run: Intervention) -> str:
    """``batch-statistics (...; largest norm 9.59)``."""
    told = [one_line(run.description)] if run.description else []
    told += [f"largest norm {brief(run.largest_norm)}"] if not math.isnan(run.largest_norm) else []
    return one_line(run.name) + (f" ({'; '.join(told)})" if told else "")


def raised(diagnosis: Diagnosis) -> str:
    """The exception in a sentence: type, where it was raised, message; empty without one."""
    error = diagnosis.exception
    if error is None:
        return ""
    message = f": {error.message}" if error.message else ""
    return f"{error.type} raised {raised_where(diagnosis)}{message}"


def raised_where(diagnosis: Diagnosis) -> str:
    """Where the exception was raised, as far as is known."""
    if diagnosis.exception is not None and diagnosis.exception.inner_loop:
        return "inside an inner loop"
    seen_any = diagnosis.summary.inner_steps
    return "outside the inner loops that were seen" if seen_any else "before any inner step"


def raised_first(diagnosis: Diagnosis) -> bool:
    """Whether the exception is the first answer: in an inner loop, explained by no cause."""
    error = diagnosis.exception
    return error is not None and error.inner_loop and diagnosis.root_cause is None


def why(diagnosis: Diagnosis) -> str:
    """Why, in a sentence or two: the root cause, else the gravest finding, else empty."""
    if diagnosis.root_cause is not None:
        return diagnosis.root_cause.summary
    gravest = ranked(diagnosis.findings)
    return gravest[0].message if gravest and gravest[0].severity > Severity.INFO else ""


def fix(diagnosis: Diagnosis) -> str:
    """What to change: the root cause's fix, else the gravest finding's, else empty."""
    if diagnosis.root_cause is not None:
        return diagnosis.root_cause.fix
    gravest = ranked(diagnosis.findings)
    return gravest[0].fix if gravest and gravest[0].severity > Severity.INFO else ""


def story(diagnosis: Diagnosis) -> tuple[Mark, ...]:
    """The lines of the user's code to show, in the order they tell the story, each once."""
    marks: list[Mark] = []
    if diagnosis.root_cause is not None:
        marks += diagnosis.root_cause.marks
        if not marks:
            chosen = [i for i in diagnosis.root_cause.findings if 0 <= i < len(diagnosis.findings)]
            marks += [mark for i in chosen for mark in diagnosis.findings[i].marks]
    if not marks:
        telling = [f for f in ranked(diagnosis.findings) if f.severity > Severity.INFO and f.marks]
        marks += telling[0].marks if telling else ()
    error = diagnosis.exception
    if error is not None and error.site and error.site not in {mark.site for mark in marks}:
        marks.append(Mark(error.site, f"raised {error.type}"))
    return tuple(dict.fromkeys(marks))


def ranked(findings: Iterable[Finding]) -> list[Finding]:
    """The findings, gravest first, otherwise in the order given."""
    return sorted(findings, key=lambda finding: -finding.severity)


def by_rule(findings: Iterable[Finding]) -> list[tuple[Finding, int]]:
    """Findings folded by rule: each rule's gravest first finding and its count in all.

    Where not all of a rule's findings count the same thing, the finding counts times.
    """
    telling: dict[str, Finding] = {}
    total: dict[str, int] = {}
    for finding in ranked(findings):
        first = telling.setdefault(finding.rule, finding)
        if first.unit != finding.unit:
            telling[finding.rule] = replace(first, unit="time")
        total[finding.rule] = total.get(finding.rule, 0) + finding.count
    return [(finding, total[rule]) for rule, finding in telling.items()]


def seen(finding: Finding, count: int | None = None) -> str:
    """How often: ``"10 tasks"``, ``"6 outer steps"``; empty for once.

    Args:
        finding: says what is counted.
        count: in place of the finding's own.
    """
    count = finding.count if count is None else count
    return count_of(count, one_line(finding.unit)) if count > 1 else ""


def tally(findings: Iterable[Finding]) -> str:
    """``"2 errors, 1 warning"``: how many findings of each severity, or ``"no findings"``."""
    severities = [finding.severity for finding in findings]
    counts = [
        (severities.count(severity), severity.label)
        for severity in sorted(set(severities), reverse=True)
    ]
    nouns = {"info": "remark"}
    return (
        ", ".join(count_of(number, nouns.get(label, label)) for number, label in counts)
        or "no findings"
    )


def place(finding: Finding) -> str:
    """Layer, task, step, phase and rank of a finding in words, as far as known."""
    parts = [finding.layer] if finding.layer else []
    parts += [f"task {finding.task}"] if finding.task is not None else []
    parts += [f"step {finding.step}"] if finding.step is not None else []
    parts += [finding.phase] if finding.phase else []
    parts += [f"rank {finding.rank}"] if finding.rank else []
    return one_line(", ".join(parts))


def posix_path(path: str) -> str:
    """``path`` made short, with forward slashes: what code hosts expect."""
    return short_path(path).replace(os.sep, "/")
