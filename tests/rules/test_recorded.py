"""A recording gives the rules the very blocks they saw live."""

import json
import math

import numpy as np
import pytest

from divergence_probe.diagnosis.analysis import Analysis
from divergence_probe.errors import RecordingError
from divergence_probe.record.reader import Recording
from divergence_probe.record.schema import SCHEMA_VERSION, Event
from divergence_probe.record.writer import Writer

from .blocks import INF, NAN, end, evaluated, inner, make, outer, query, start, train

META = {"schema_version": SCHEMA_VERSION}


def blocks(tasks=6):
    """Tasks of three blocks, with something wrong in some of them."""
    made, since = [], 0.0
    for task in range(tasks):
        bad = {"carried_gradient": 1.0} if task == 2 else {}
        norm = 500.0 if task == 4 else 10.1
        for rows, events in (
            ([inner(task, **train(), dropout=1)], [start(task, since)]),
            ([inner(task, 1, norm_after=[norm, 1, NAN if task == 5 else 1], **bad)], []),
            (
                [query(task, **evaluated(), dropout=0), outer(gradient_norm=[INF, 1, 1])],
                [
                    end(task, since + 2),
                    Event("outer-step", -1, -1, since + 3, None, {"without": ["é"]}),
                ],
            ),
        ):
            made.append(
                make(*rows, batch_norms=["norm"], dropouts=["drop"], events=events, since=since)
            )
            since += len(rows)
    return made


def write(folder, made, complete=True, rank=0):
    writer = Writer(folder, META, rank)
    for block in made:
        writer.block(block, [block.layout.to_json()])
    if complete:
        writer.close({"seconds": 1.0})
    return writer


def assert_equal(left, right):
    assert left.layout == right.layout and left.sites == right.sites and left.rank == right.rank
    assert left.events == right.events
    for name in ("scalars", "parameters", "batch_norm"):
        ours, theirs = getattr(left, name), getattr(right, name)
        assert set(ours) == set(theirs)
        for column, values in ours.items():
            np.testing.assert_array_equal(theirs[column], values, err_msg=column)
    np.testing.assert_array_equal(right.dropout, left.dropout)


def test_blocks_come_back_equal(tmp_path):
    made = blocks()
    write(tmp_path, made)

    for left, right in zip(made, Recording(tmp_path).blocks(), strict=True):
        assert_equal(left, right)


def test_what_was_flushed_is_there_before_the_run_ends(tmp_path):
    writer = write(tmp_path, blocks(2), complete=False)

    assert len(list(Recording(tmp_path).blocks())) == 6
    assert not Recording(tmp_path).meta.get("complete")
    writer.close({})


@pytest.mark.parametrize("cut", [1, 7, 100, 1000, 0.5, 0.999])
def test_a_cut_off_tail_is_ignored(tmp_path, cut):
    made = blocks()
    write(tmp_path, made)
    path = tmp_path / "rank-0" / "steps.arrow"
    whole = path.read_bytes()
    path.write_bytes(whole[: -cut if cut >= 1 else int(len(whole) * (1 - cut))])

    read = [block for block in Recording(tmp_path).blocks() if len(block)]

    assert len(read) < len(made) if cut != 1 and cut != 7 else len(read) == len(made)
    for left, right in zip(made, read, strict=False):
        left.events = right.events = []  # events after the cut come at the end
        assert_equal(left, right)


def test_ranks_share_a_folder(tmp_path):
    for rank in (0, 1):
        made = [make(inner(), events=[start()], rank=rank)]
        write(tmp_path, made, rank=rank)

    assert [block.rank for block in Recording(tmp_path).blocks()] == [0, 1]


def test_events_alone_are_kept(tmp_path):
    write(tmp_path, [make(events=[start(), end()])])

    (block,) = Recording(tmp_path).blocks()
    assert len(block) == 0 and [event.kind for event in block.events] == ["task-start", "task-end"]


def test_rules_say_the_same_of_a_recording_as_live(tmp_path):
    made = blocks()
    live, replayed = Analysis(), Analysis()
    for block in made:
        live.feed(block)
    write(tmp_path, made)
    for block in Recording(tmp_path).blocks():
        replayed.feed(block)
    live.finish()
    replayed.finish()

    ours, theirs = live.diagnosis(), replayed.diagnosis()
    assert {"NF001", "NF002", "NG001", "OPT002", "MODE001"} <= {f.rule for f in ours.findings}
    assert repr(theirs) == repr(ours)  # nan is not equal to itself


def test_many_rows_are_read_block_by_block(tmp_path):
    """Memory stays at a block's; a count says that none is lost."""
    writer = Writer(tmp_path, META)
    for task in range(300):
        rows = [inner(task, step, carried_gradient=float(step == 1)) for step in range(64)]
        events = [start(task, task * 64.0), end(task, task * 64.0 + 63)]
        block = make(*rows, events=events, since=task * 64.0)
        writer.block(block, [block.layout.to_json()])
    writer.close({})

    analysis, seen = Analysis(), 0
    for block in Recording(tmp_path).blocks():
        analysis.feed(block)
        seen += len(block)

    assert seen == 300 * 64 and analysis.collector.tasks == 300
    assert {f.rule: f.count for f in analysis.engine.findings}["OPT002"] == 300
    assert analysis.engine._tasks == {}


def test_non_finite_numbers_survive(tmp_path):
    write(tmp_path, [make(inner(loss=INF, norm_after=[NAN, -INF, 1e308], learning_rate=-INF))])

    (block,) = Recording(tmp_path).blocks()
    assert math.isinf(block.scalars["loss"][0])
    np.testing.assert_array_equal(block.parameters["norm_after"], [[NAN, -INF, 1e308]])


def test_folders_that_hold_no_recording_or_one_already(tmp_path):
    with pytest.raises(RecordingError, match="holds no recording"):
        Recording(tmp_path)
    write(tmp_path, blocks(1))
    with pytest.raises(RecordingError, match="--force"):
        Writer(tmp_path, META)
    Writer(tmp_path, META, force=True).close({})
    assert list(Recording(tmp_path).blocks()) == []
    newer = json.dumps({"schema_version": SCHEMA_VERSION + 1, "tool_version": "99"})
    (tmp_path / "meta.json").write_text(newer)
    with pytest.raises(RecordingError, match="Upgrade"):
        Recording(tmp_path)
