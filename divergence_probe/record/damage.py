"""What becomes of a recording's files afterwards: cut off, overwritten, deleted."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from divergence_probe.errors import RecordingError

#: How an Arrow stream ends that was closed.
_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"


@contextlib.contextmanager
def told_as_damage(path: Path) -> Iterator[None]:
    """What cannot be made sense of in here is damage of ``path``.

    Raises:
        RecordingError: it is damaged.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        pa.ArrowException,
    ) as error:
        raise RecordingError(
            f"{path} is damaged ({type(error).__name__}: {error}). Restore it, or record the run "
            "again."
        ) from error


def flaw_of(path: Path) -> str | None:
    """What keeps a stream that was closed from being whole; None where it is."""
    try:
        with pa.memory_map(os.fsencode(path)) as file:
            for batch in pa.ipc.open_stream(file):
                valid(batch)
            end = file.tell()
            file.seek(max(file.size() - len(_END), 0))
            whole = end == file.size() and file.read() == _END
    except FileNotFoundError:
        return "is missing"
    except (pa.ArrowException, OSError):
        whole = False
    return None if whole else "is cut off or damaged"


def valid(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch; what it says of its own lengths is not believed, for arrays are views of it.

    Raises:
        ArrowInvalid: it is damaged.
    """
    batch.validate(full=True)
    return batch
