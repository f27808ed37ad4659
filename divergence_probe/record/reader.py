"""Read a recording: block by block for the rules, as tables for people."""

from __future__ import annotations

import contextlib
import heapq
import json
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from divergence_probe.errors import RecordingError
from divergence_probe.record.damage import flaw_of, told_as_damage, valid
from divergence_probe.record.schema import (
    BATCH_NORM_COLUMNS,
    PARAMETER_COLUMNS,
    SCALAR_COLUMNS,
    SCHEMA_VERSION,
    Array,
    Block,
    Event,
    Layout,
    empty_block,
)

if TYPE_CHECKING:
    import pandas as pd

_STREAMS = ("steps.arrow", "events.arrow")


class Recording:
    """A recording folder, finished or not; a cut-off tail is left out, see :attr:`damage`.

    Args:
        folder: as written by ``probe run -o FOLDER``.

    Raises:
        RecordingError: there is no recording, it is damaged beyond reading, or it was written by a
            newer version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.meta: dict[str, Any] = _read_meta(self.meta_file)
        except FileNotFoundError as error:
            raise RecordingError(
                f"'{self.folder}' holds no recording (no meta.json). Give the folder that "
                "`probe run -o FOLDER` wrote; by default they are under .probe/."
            ) from error

    @property
    def meta_file(self) -> Path:
        """Rank 0's; where that never wrote any (it is on another machine), the lowest rank's."""
        own = [self.folder / f"rank-{rank}" / "meta.json" for rank in self.ranks]
        candidates = [self.folder / "meta.json", *own]
        return next((path for path in candidates if path.exists()), candidates[0])

    @property
    def ranks(self) -> list[int]:
        """Ranks that recorded, in order."""
        numbers = (f.name.removeprefix("rank-") for f in self.folder.glob("rank-*") if f.is_dir())
        return sorted(int(number) for number in numbers if number.isdigit())

    def rank_meta(self, rank: int) -> dict[str, Any]:
        """What one rank's process wrote about itself; rank 0's is the recording's own."""
        path = self._rank_meta_file(rank)
        return self.meta if path == self.meta_file else _read_meta(path)

    def _rank_meta_file(self, rank: int) -> Path:
        path = self.folder / f"rank-{rank}" / "meta.json"
        return path if rank and path.exists() else self.meta_file

    @property
    def complete(self) -> bool:
        """Whether every rank wrote its recording to the end; False while one is still at it."""
        return all(self.rank_meta(rank).get("complete") for rank in (self.ranks or [0]))

    @cached_property
    def damage(self) -> str | None:
        """What is not there any more of a recording that was complete, in a sentence; else None.

        (Where a run was killed, a tail that is cut off is as it should be.)
        """
        leader = [0] if (self.folder / "meta.json").exists() else []
        for rank in sorted({*leader, *self.ranks}):
            if not self.rank_meta(rank).get("complete"):
                continue
            for path in (self.folder / f"rank-{rank}" / name for name in _STREAMS):
                flaw = flaw_of(path)
                if flaw is not None:
                    return (
                        f"{path} {flaw}, though the run had written all of it, so nobody knows "
                        "what else there was. Restore the file, or record the run again."
                    )
        return None

    def blocks(self) -> Iterator[Block]:
        """Every block as it was recorded, events with the rows they precede.

        Blocks of several ranks take turns, in the order of the time since each was attached, so
        that who compares ranks has to remember little.
        """
        by_rank = (self._rank_blocks(rank) for rank in self.ranks)
        yield from heapq.merge(*by_rank, key=_began)

    def _rank_blocks(self, rank: int) -> Iterator[Block]:
        folder = self.folder / f"rank-{rank}"
        meta = self.rank_meta(rank)
        meta_file = self._rank_meta_file(rank)
        with told_as_damage(meta_file):
            layouts = [Layout.from_json(i, data) for i, data in enumerate(meta.get("layouts", []))]
            sites = list(meta.get("sites", ()))
        with told_as_damage(folder):
            events = _Events(folder / "events.arrow")
            for batch in _batches(folder / "steps.arrow"):
                with told_as_damage(meta_file):
                    layout = _layout(batch, layouts)
                until = float(batch.column("seconds")[batch.num_rows - 1].as_py())
                yield _block(batch, layout, sites, events.until(until), rank)
        rest = events.until(float("inf"))
        if rest:
            layout = layouts[0] if layouts else Layout(0, "", ())
            yield empty_block(layout, sites, rest, rank)

    def events(self) -> list[Event]:
        """Every event of every rank, in order of time within a rank."""
        return [
            event
            for rank in self.ranks
            for event in _Events(self.folder / f"rank-{rank}" / "events.arrow").until(float("inf"))
        ]

    def steps(self) -> pd.DataFrame:
        """One row per inner (or query, or outer) step and parameter; see :mod:`.tables`."""
        from divergence_probe.record import tables

        return tables.steps(self)

    def batch_norm(self) -> pd.DataFrame:
        """One row per step and normalisation layer that was called."""
        from divergence_probe.record import tables

        return tables.batch_norm(self)

    def tasks(self) -> pd.DataFrame:
        """One row per task."""
        from divergence_probe.record import tables

        return tables.tasks(self)

    def findings(self) -> pd.DataFrame:
        """One row per finding, as the run that recorded it wrote them."""
        from divergence_probe.record import tables

        return tables.findings(self)


def _read_meta(path: Path) -> dict[str, Any]:
    """The content of a ``meta.json``.

    Raises:
        FileNotFoundError: there is none.
        RecordingError: it is damaged, or was written by a newer version.
    """
    with told_as_damage(path):
        meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = int(meta["schema_version"])
    if version > SCHEMA_VERSION:
        raise RecordingError(
            f"{path.parent} was written by a newer version ({meta.get('tool_version')}). "
            "Upgrade divergence-probe to read it."
        )
    return meta


def _began(block: Block) -> float:
    """When a block's first row was taken, or its first event happened; seconds."""
    if len(block):
        return float(block.scalars["seconds"][0])
    return block.events[0].seconds if block.events else 0.0


class _Events:
    def __init__(self, path: Path) -> None:
        self._events = [event for batch in _batches(path) for event in _decode(batch)]
        self._next = 0

    def until(self, seconds: float) -> list[Event]:
        start = self._next
        while self._next < len(self._events) and self._events[self._next].seconds <= seconds:
            self._next += 1
        return self._events[start : self._next]


def _decode(batch: pa.RecordBatch) -> Iterator[Event]:
    for row in batch.to_pylist():
        yield Event(
            row["kind"],
            row["task"],
            row["step"],
            row["seconds"],
            row["site"],
            json.loads(row["data"]),
        )


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The whole batches of a stream; one cut off in the middle, or damaged, ends it quietly."""
    with (
        contextlib.suppress(StopIteration, pa.ArrowException, OSError),
        pa.OSFile(os.fsencode(path)) as file,
    ):
        stream = pa.ipc.open_stream(file)
        while True:
            yield valid(stream.read_next_batch())


def _layout(batch: pa.RecordBatch, layouts: list[Layout]) -> Layout:
    """The names behind a batch's list columns.

    Raises:
        LookupError: they are not there.
    """
    number, width = int(batch.column("layout")[0].as_py()), len(batch.column("norm_before")[0])
    if not 0 <= number < len(layouts) or len(layouts[number].parameters) != width:
        raise LookupError(f"the names of the {width} parameters of layout {number} are not there")
    return layouts[number]


def _block(
    batch: pa.RecordBatch, layout: Layout, sites: list[str], events: list[Event], rank: int
) -> Block:
    return Block(
        layout,
        {name: _scalars(batch, name) for name in SCALAR_COLUMNS},
        {name: _table(batch, name, "norm_before") for name in PARAMETER_COLUMNS},
        {name: _table(batch, name, "bn_calls") for name in BATCH_NORM_COLUMNS},
        _table(batch, "dropout", "dropout"),
        events,
        sites,
        rank,
    )


def _scalars(batch: pa.RecordBatch, name: str) -> Array:
    """``[S]``; nan where the recording is from before there was such a column."""
    if name not in batch.schema.names:
        return np.full(len(batch), np.nan)
    return np.asarray(batch.column(name).to_numpy(zero_copy_only=False), dtype=np.float64)


def _table(batch: pa.RecordBatch, name: str, like: str) -> Array:
    """``[S, P]``; nan, in the shape of the column ``like``, where there is no such column."""
    column = batch.column(name if name in batch.schema.names else like)
    values = np.asarray(column.flatten().to_numpy(zero_copy_only=False), dtype=np.float64)
    values = values.reshape(len(column), -1)
    return values if name in batch.schema.names else np.full_like(values, np.nan)
