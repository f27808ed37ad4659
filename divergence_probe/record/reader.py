"""Read a recording: block by block for the rules, as tables for people."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from divergence_probe.errors import RecordingError
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


class Recording:
    """A recording folder, finished or not; a cut-off tail is ignored.

    Args:
        folder: as written by ``probe run -o FOLDER``.

    Raises:
        RecordingError: there is no recording, or it was written by a newer version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self._meta_file()
        try:
            self.meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise RecordingError(
                f"'{self.folder}' holds no recording (no meta.json). Give the folder that "
                "`probe run -o FOLDER` wrote; by default they are under .probe/."
            ) from error
        except (OSError, ValueError) as error:
            raise RecordingError(
                f"{path} cannot be read ({error}). Record the run again."
            ) from error
        if self.meta.get("schema_version", 0) > SCHEMA_VERSION:
            raise RecordingError(
                f"{self.folder} was written by a newer version "
                f"({self.meta.get('tool_version')}). Upgrade divergence-probe to read it."
            )

    def _meta_file(self) -> Path:
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
        path = self.folder / f"rank-{rank}" / "meta.json"
        if rank and path.exists():
            own: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return own
        return self.meta

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
        layouts = [Layout.from_json(i, data) for i, data in enumerate(meta.get("layouts", []))]
        sites = meta.get("sites", [])
        events = _Events(folder / "events.arrow")
        for batch in _batches(folder / "steps.arrow"):
            layout = layouts[batch.column("layout")[0].as_py()]
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
    """The whole batches of a stream; one cut off in the middle ends it quietly."""
    if not path.exists():
        return
    with pa.OSFile(str(path)) as file:
        try:
            stream = pa.ipc.open_stream(file)
        except (pa.ArrowInvalid, OSError):
            return
        while True:
            try:
                yield stream.read_next_batch()
            except (StopIteration, pa.ArrowInvalid, OSError):
                return


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
