"""Write a recording as it happens: Arrow streams, flushed a block at a time, and ``meta.json``."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
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
)

# Arrow writes each column's pieces by themselves; together they are one call of the system.
_BUFFER = 2**18
_STAND_IN = re.compile("[\ud800-\udfff]")
_JSON = json.JSONEncoder(default=str)
_WHOLE = ("task", "step", "phase", "layout", "site", "flags", "loss_seen")


@cache
def steps_schema() -> pa.Schema:
    """The Arrow schema of ``steps.arrow``; every column documented in its field metadata."""
    fields = [
        pa.field(
            name,
            pa.int64() if name in _WHOLE else pa.float64(),
            metadata={"doc": text},
        )
        for name, text in SCALAR_COLUMNS.items()
    ]
    for columns in (PARAMETER_COLUMNS, BATCH_NORM_COLUMNS):
        fields += [
            pa.field(name, pa.list_(pa.float64()), metadata={"doc": text})
            for name, text in columns.items()
        ]
    fields.append(
        pa.field("dropout", pa.list_(pa.float64()), metadata={"doc": "1 dropped, 0 passed, -1 not"})
    )
    return pa.schema(fields, metadata={"divergence_probe": str(SCHEMA_VERSION)})


@cache
def events_schema() -> pa.Schema:
    """The Arrow schema of ``events.arrow``; ``data`` is a JSON object."""
    return pa.schema(
        [
            ("kind", pa.string()),
            ("task", pa.int64()),
            ("step", pa.int64()),
            ("seconds", pa.float64()),
            ("site", pa.string()),
            ("data", pa.string()),
        ]
    )


class Writer:
    """Appends blocks to a recording folder; what is flushed survives a SIGKILL.

    Args:
        folder: created if missing; must not hold a recording unless ``force``.
        meta: plain data about the run for ``meta.json``.
        rank: this process's rank; ranks share the folder, each has its own sub-folder.
        force: replace a recording that is already there.

    Raises:
        RecordingError: the folder holds a recording, or cannot be written.
    """

    def __init__(
        self, folder: Path, meta: Mapping[str, Any], rank: int = 0, force: bool = False
    ) -> None:
        self.folder = folder
        self._meta = dict(meta)
        self._rank = rank
        self._described: tuple[int, ...] | None = None
        if self._meta_file.exists() and not force:
            raise RecordingError(
                f"{folder} already holds a recording. Choose another folder with -o, "
                "or add --force to replace it."
            )
        try:
            self._open(folder / f"rank-{rank}")
        except OSError as error:
            raise RecordingError(
                f"Cannot write the recording to {folder}: {error.strerror or error}. "
                "Choose a writable folder with -o."
            ) from error

    def _open(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        names = [folder / f"{name}.arrow" for name in ("steps", "events")]
        self._files = [open(name, "wb", buffering=_BUFFER) for name in names]  # noqa: SIM115
        self._steps = pa.ipc.new_stream(self._files[0], steps_schema())
        self._events = pa.ipc.new_stream(self._files[1], events_schema())
        self.describe(())

    @property
    def _meta_file(self) -> Path:
        """Rank 0's is the folder's; others have their own."""
        own = f"rank-{self._rank}/meta.json"
        return self.folder / ("meta.json" if self._rank == 0 else own)

    def block(self, block: Block, layouts: list[dict[str, Any]]) -> None:
        """Append one block and flush it. Names are written before the rows that need them."""
        described = (len(layouts), len(block.sites), *(len(x["batch_norms"]) for x in layouts))
        if described != self._described:
            self._described = described
            self._meta["layouts"] = layouts
            self._meta["sites"] = list(block.sites)
            self.describe(())
        if len(block):
            self._steps.write_batch(_steps_batch(block))
            self._files[0].flush()
        if block.events:
            self._events.write_batch(_events_batch(block.events))
            self._files[1].flush()

    def describe(self, changes: Mapping[str, Any] | tuple[()]) -> None:
        """Update ``meta.json``; nothing where the folder has been removed meanwhile.

        The streams are open and take what comes: that is lost, but the watching goes on.
        """
        self._meta.update(changes)
        target = self._meta_file
        temporary = target.with_name(target.name + ".tmp")
        with contextlib.suppress(FileNotFoundError):
            temporary.write_text(_readable(self._meta), encoding="utf-8")
            os.replace(temporary, target)

    def close(self, changes: Mapping[str, Any]) -> None:
        """Finish the streams and note how the run ended."""
        self._steps.close()
        self._events.close()
        for file in self._files:
            file.close()
        self.describe({**changes, "complete": True})


def _readable(meta: Mapping[str, Any]) -> str:
    """JSON that any parser takes: python's stand-ins for bytes that are no UTF-8, as escapes."""
    text = json.dumps(meta, indent=1, ensure_ascii=False)
    return _STAND_IN.sub(lambda match: f"\\\\u{ord(match[0]):04x}", text)


def _steps_batch(block: Block) -> pa.RecordBatch:
    columns = [
        _numbers(block.scalars[name].astype(np.int64) if name in _WHOLE else block.scalars[name])
        for name in SCALAR_COLUMNS
    ]
    columns += _lists(block.parameters[name] for name in PARAMETER_COLUMNS)
    columns += _lists(block.batch_norm[name] for name in BATCH_NORM_COLUMNS)
    columns += _lists([block.dropout])
    return pa.RecordBatch.from_arrays(columns, schema=steps_schema())


def _lists(tables: Iterable[Array]) -> Iterator[pa.ListArray]:
    """``[S, P]`` tables of one width as columns of lists."""
    offsets: pa.Array | None = None
    for values in tables:
        if offsets is None:
            rows, width = values.shape
            offsets = _numbers(np.arange(rows + 1, dtype=np.int32) * width)
        yield pa.ListArray.from_arrays(offsets, _numbers(values.reshape(-1)))


def _numbers(values: npt.NDArray[Any]) -> pa.Array:
    """An Arrow array over numpy's memory; ``pa.array`` would import pandas in the run.

    That costs 0.3 s, and pandas touches the warning filters: Python then forgets which warnings of
    the user's code it has shown, and shows them again.
    """
    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(
        pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)]
    )


def _strings(values: Sequence[str | None]) -> pa.Array:
    """As :func:`_numbers`, of texts; None is null. Bytes that are no UTF-8 become escapes."""
    codes = {value: (value or "").encode(errors="backslashreplace") for value in set(values)}
    encoded = [codes[value] for value in values]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    there = np.packbits([value is not None for value in values], bitorder="little")
    buffers = [there, offsets, b"".join(encoded)]
    return pa.Array.from_buffers(pa.string(), len(values), [pa.py_buffer(b) for b in buffers])


def _events_batch(events: list[Event]) -> pa.RecordBatch:
    columns = [
        _strings([event.kind for event in events]),
        _numbers(np.array([event.task for event in events], dtype=np.int64)),
        _numbers(np.array([event.step for event in events], dtype=np.int64)),
        _numbers(np.array([event.seconds for event in events], dtype=np.float64)),
        _strings([event.site for event in events]),
        _strings(_texts(events)),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=events_schema())


def _texts(events: list[Event]) -> list[str]:
    """Each event's data as JSON. Most are alike, and ``repr`` tells so in a fraction of the time.

    (Equality would not: ``{"a": 1}`` equals ``{"a": True}``.)
    """
    known: dict[str, str] = {}
    texts = []
    for event in events:
        key = repr(event.data)
        if key not in known:
            known[key] = _JSON.encode(event.data)
        texts.append(known[key])
    return texts
