"""The evidence in columns: norms by step, BatchNorm statistics, re-runs, findings by rule."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text

from divergence_probe.diagnosis.diagnosis import BatchNormRow, Intervention, NormTrace
from divergence_probe.report import numbers
from divergence_probe.report.rich_view.layout import (
    GUTTER,
    SEVERITY_STYLES,
    columns,
    cropped,
    short_name,
    wrapped,
)
from divergence_probe.report.wording import count_of, one_line, seen
from divergence_probe.rules.finding import Finding

_SPARK = 10
_WIDE = 76  # columns have their long titles, and counts a column
_NAME = 10  # a layer name cut shorter than this is no help


def norm_table(traces: Sequence[NormTrace], width: int, limit: int) -> list[Text]:
    """Norms by step, largest growth first: as many steps as fit, before and after always."""
    grave = sum(numbers.is_grave(trace.norms) for trace in traces)
    # Beside the ones that grew, two that did not are contrast enough.
    shown = numbers.by_growth(traces)[: min(limit, max(4, grave + 2))]
    span = numbers.log_span([trace.norms for trace in shown])
    longest = max((len(trace.norms) for trace in shown), default=0)
    steps = _steps_that_fit(shown, longest, width)
    task_head = [Text("task", style="dim")] if _tell_task(shown, width) else []
    head = [
        Text("parameter", style="dim"),
        *task_head,
        *(Text(_step_label(i), style="dim") for i in steps),
    ]
    spark = _spark_width(width)
    rows = [[*head, Text("growth", style="dim"), Text("")]]
    for trace in shown:
        style = "red" if numbers.is_grave(trace.norms) else ""
        cells = [Text(str(trace.task), style="dim")] if task_head else []
        cells += [_norm_cell(trace.norms, i) for i in steps]
        cells.append(Text(numbers.growth_words(trace.norms), style=f"bold {style}"))
        curve = numbers.sparkline(trace.norms, span, spark) if spark else ""
        cells.append(Text(curve, style=style))
        rows.append([Text(one_line(trace.layer)), *cells])
    _shorten_names(rows, width)
    lines = columns(rows, [False, *[True] * (len(rows[0]) - 2), False], width)
    return lines + _below_norms(traces, shown, width)


def _spark_width(width: int) -> int:
    return _SPARK if width >= 56 else 0


def _tell_task(traces: Sequence[NormTrace], width: int) -> bool:
    return width >= 72 and len({trace.task for trace in traces}) > 1


def _steps_that_fit(traces: Sequence[NormTrace], longest: int, width: int) -> list[int]:
    """Indices into the norms to show: the most telling ones that fit, in order."""
    if not longest:
        return []
    wanted = numbers.telling_steps(traces)
    name = min(max(cell_len(one_line(trace.layer)) for trace in traces), 26)
    growth_width = max([6, *(cell_len(numbers.growth_words(trace.norms)) for trace in traces)])
    others = max(name, 9) + 2 + growth_width + 2 + min(_spark_width(width), longest)
    others += 6 if _tell_task(traces, width) else 0
    room = width - GUTTER - others
    chosen: set[int] = set()
    for index in wanted:
        cells = [
            numbers.compact(trace.norms[index]) for trace in traces if index < len(trace.norms)
        ]
        size = max(map(cell_len, [*cells, _step_label(index)])) + 2
        if size > room and len(chosen) >= 2:
            break
        room -= size
        chosen.add(index)
    return sorted(chosen)


def _step_label(index: int) -> str:
    return "before" if index == 0 else f"step {index - 1}"


def _norm_cell(norms: Sequence[float], index: int) -> Text:
    if index >= len(norms):
        return Text("")
    bad = not math.isfinite(norms[index])
    grown = bad or (norms[0] > 0 and norms[index] >= numbers.GRAVE_GROWTH * norms[0])
    return Text(numbers.compact(norms[index]), style="bold red" if bad else "red" if grown else "")


def _shorten_names(rows: list[list[Text]], width: int) -> None:
    """Cut the first column so that the line fits; the numbers stay whole."""
    others = sum(max(row[i].cell_len for row in rows) + 2 for i in range(1, len(rows[0])))
    room = max(_NAME, width - GUTTER - others)
    for row in rows:
        row[0] = Text(short_name(row[0].plain, room), style=row[0].style)


def _below_norms(traces: Sequence[NormTrace], shown: Sequence[NormTrace], width: int) -> list[Text]:
    notes = []
    if len(traces) > len(shown):
        rest = numbers.by_growth(traces)[len(shown) :]
        words = f"and {len(rest)} more"
        largest = numbers.growth_words(rest[0].norms)
        notes.append(words + (f", up to {largest}" if largest.startswith("×") else ""))
    first = numbers.first_to_grow(traces)
    if first is not None:
        notes.append(f"first to grow: {one_line(first.layer)} at step {first.first_to_grow}")
    return wrapped(Text("; ".join(notes), style="dim"), width, " " * GUTTER) if notes else []


def batch_norm_table(rows: Sequence[BatchNormRow], width: int, limit: int) -> list[Text]:
    """BatchNorm layers, statistics farthest from the batch's own first."""
    shown = numbers.by_distance(rows)[:limit]
    head = ["layer", "mode", "batches seen", "mean off by", "variance", "buffers"]
    if width < _WIDE:
        head = ["layer", "mode", "seen", "mean", "var", "buffers"]
    cells = [[Text(title, style="dim") for title in head]]
    cells += [_batch_norm_cells(row) for row in shown]
    if all(row.base_buffers == "own" for row in shown):
        cells = [line[:-1] for line in cells]
    right = [False, False, *[True] * 3, False][: len(cells[0])]
    few = [row.values_per_channel for row in shown]
    if width >= 100 and any(values is not None for values in few):
        cells[0].append(Text("values/channel", style="dim"))
        for line, values in zip(cells[1:], few, strict=True):
            line.append(Text("–" if values is None else str(values)))
        right.append(True)
    _shorten_names(cells, width)
    lines = columns(cells, right, width)
    for note in numbers.mode_notes(shown):
        lines += wrapped(Text(note, style="dim"), width, " " * GUTTER)
    if len(rows) > len(shown):
        more = f"and {count_of(len(rows) - len(shown), 'more layer')}, closer to the batch"
        lines += wrapped(Text(more, style="dim"), width, " " * GUTTER)
    return lines


def _batch_norm_cells(row: BatchNormRow) -> list[Text]:
    measured = not math.isnan(row.mean_distance)
    level = "red" if row.mean_distance >= numbers.GRAVE_DISTANCE else "yellow"
    style = level if measured and row.mean_distance >= numbers.DOUBTFUL_DISTANCE else ""
    seen = Text("–" if row.batches_seen is None else str(row.batches_seen))
    ratio = Text(
        "–" if math.isnan(row.variance_ratio) else numbers.times(row.variance_ratio), style=style
    )
    distance = Text(f"{numbers.brief(row.mean_distance)} σ" if measured else "–", style=style)
    mode = Text(cropped(one_line(numbers.mode_words(row)), 21))
    buffers = "" if row.base_buffers == "own" else row.base_buffers
    return [
        Text(one_line(row.layer)),
        mode,
        seen,
        distance,
        ratio,
        Text(cropped(one_line(buffers), 12)),
    ]


def intervention_table(runs: Sequence[Intervention], width: int) -> list[Text]:
    """What each re-run changed, how it ended, and the largest norm it ended with."""
    styles = {"diverged": "red", "stable": "green"}
    rows = [
        [Text(title, style="dim") for title in ("re-run with", "outcome", "largest norm", "of")]
    ]
    for run in runs:
        outcome = Text(run.outcome, style=styles.get(run.outcome, "yellow"))
        norm = Text(
            ""
            if math.isnan(run.largest_norm) and run.outcome != "diverged"
            else numbers.brief(run.largest_norm)
        )
        rows.append(
            [
                Text(one_line(run.name)),
                outcome,
                norm,
                Text(short_name(one_line(run.layer or ""), 30)),
            ]
        )
    if width < 72:
        rows = [row[:3] for row in rows]
    _shorten_names(rows, width)
    return columns(rows, [False, False, True, False][: len(rows[0])], width)


def findings_list(folded: Sequence[tuple[Finding, int]], width: int, limit: int) -> list[Text]:
    """One entry a rule: severity, code, how often, and what its most telling finding says."""
    shown = folded[:limit]
    code_width = max((cell_len(one_line(finding.rule)) for finding, _ in shown), default=0)
    counts = [seen(finding, count) for finding, count in shown]
    beside = width >= _WIDE
    count_width = max(map(cell_len, counts), default=0) if beside else 0
    lines: list[Text] = []
    for (finding, _), times in zip(shown, counts, strict=True):
        label = finding.severity.label
        start = Text(" " * GUTTER) + Text(f"{label:<7}", style=SEVERITY_STYLES[label])
        start += Text(
            f"  {cropped(one_line(finding.rule), 12):<{min(12, code_width)}}", style="bold"
        )
        start += Text(f"  {times:<{count_width}}" if count_width else "")
        room = width - start.cell_len - 2
        often = f"{times}: " if times and not beside else ""
        body = wrapped(Text(often + one_line(finding.message)), room)
        if len(body) > 3:
            body = [*body[:2], Text(cropped(body[2].plain + " " + body[3].plain, room))]
        lines += [
            (start if n == 0 else Text(" " * start.cell_len)) + Text("  ") + line
            for n, line in enumerate(body)
        ]
    if len(folded) > limit:
        lines.append(Text(" " * GUTTER + f"and {len(folded) - limit} more rules", style="dim"))
    return lines
