"""``probe export``: a recording as a table for other tools."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from divergence_probe.commands.base import Command
from divergence_probe.errors import ProbeError, UsageError

if TYPE_CHECKING:
    import pandas as pd

    from divergence_probe.record.reader import Recording

_TABLES = ("steps", "batch_norm", "tasks", "findings")


class Export(Command):
    """Write one table of a recording as CSV, Parquet or JSON, by the file's ending.

    In JSON, which has no such numbers, non-finite ones are the texts "nan", "inf" and "-inf".
    """

    name = "export"
    order = 4

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """The recording, the table and the file."""
        parser.add_argument("recording", metavar="RECORDING", type=Path, help="its folder")
        parser.add_argument(
            "-o",
            "--output",
            metavar="FILE",
            type=Path,
            required=True,
            help="ends in .csv, .parquet or .json; replaced where it exists",
        )
        parser.add_argument("--table", choices=_TABLES, default="steps", help="default: steps")

    def run(self, arguments: argparse.Namespace) -> int:
        """Read the table and write it."""
        from divergence_probe.commands.options import check_writable
        from divergence_probe.record.reader import Recording

        path = arguments.output
        write = _WRITERS.get(path.suffix.lower())
        if write is None:
            raise UsageError(
                f"-o {path}: the ending must be one of {', '.join(_WRITERS)}; it says the format."
            )
        check_writable(path)
        recording = Recording(arguments.recording)
        table = _table(recording, arguments.table)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            write(table, temporary)
            os.replace(temporary, path)
        except OSError as error:
            raise ProbeError(
                f"Cannot write {path}: {error.strerror or error}. Choose another file with -o."
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
        print(f"{path}: {len(table)} rows of {arguments.table}")
        if recording.damage:
            print(f"probe: {recording.damage}", file=sys.stderr)
        return 0


def _table(recording: Recording, name: str) -> pd.DataFrame:
    from divergence_probe.stored import FINDINGS

    if name != "findings" or (recording.folder / FINDINGS).exists():
        table: pd.DataFrame = getattr(recording, name)()
        return table
    import pandas as pd

    from divergence_probe.replay import replay

    return pd.DataFrame(replay(recording).to_dict()["findings"])  # of a run that was killed


def _flat(table: pd.DataFrame) -> pd.DataFrame:
    """Nested values as JSON text: neither CSV nor one Parquet column holds mixed ones."""
    flat = table.copy()
    for column in flat.columns:
        values = flat[column]
        if values.map(lambda value: isinstance(value, dict | list)).any():
            flat[column] = values.map(json.dumps)
    return flat


def _csv(table: pd.DataFrame, path: Path) -> None:
    _flat(table).to_csv(path, index=False, na_rep="nan")


def _parquet(table: pd.DataFrame, path: Path) -> None:
    _flat(table).to_parquet(path, index=False)


def _json(table: pd.DataFrame, path: Path) -> None:
    records = [
        {str(key): _plain(value) for key, value in record.items()}
        for record in table.to_dict(orient="records")
    ]
    path.write_text(json.dumps(records, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    import math

    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


_WRITERS: dict[str, Callable[[pd.DataFrame, Path], None]] = {
    ".csv": _csv,
    ".parquet": _parquet,
    ".json": _json,
}
