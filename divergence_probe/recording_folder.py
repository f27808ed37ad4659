"""Where a run's recording goes: the folder asked for, or a new one under ``.probe/``."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from divergence_probe.errors import RecordingError
from divergence_probe.ranks import Place
from divergence_probe.stored import DIAGNOSIS, FINDINGS

DEFAULT_PARENT = ".probe"
ALONE = Place()


def prepare(asked: Path | None, name: str, *, force: bool = False, place: Place = ALONE) -> Path:
    """Make the folder and see that it can be written; absolute, since scripts change directory.

    Args:
        asked: the folder given with ``-o``, or None for a new one.
        name: what runs; part of a new folder's name.
        force: replace a recording that is there. Nothing but a recording is ever removed.
        place: which of several processes this is; they share one folder.

    Raises:
        RecordingError: a recording is there already, or the folder cannot be written.
    """
    folder = Path.cwd() / (asked if asked is not None else DEFAULT_PARENT)
    try:
        if asked is None and not place.several:
            return _new(folder, name)
        if asked is None:
            folder = _shared(folder, name, place)
        folder.mkdir(parents=True, exist_ok=True)
        probe_file = folder / f".writable-{place.rank}"
        probe_file.touch()
        probe_file.unlink()
        _clear(folder, force, place)
    except OSError as error:
        raise RecordingError(
            f"Cannot write the recording to {folder}: {error.strerror or error}. "
            "Name a folder you may write to, with -o."
        ) from error
    return folder


def is_kept(folder: Path, place: Place = ALONE) -> bool:
    """Whether what was recorded is still there; a script may have cleared its own folders."""
    return (folder / f"rank-{place.rank}" / "steps.arrow").exists()


def _shared(parent: Path, name: str, place: Place) -> Path:
    """A folder that every rank on this machine calls the same: by what launched them."""
    if place.local_world < place.world:
        raise RecordingError(
            f"{place.world} ranks run on several machines: name the folder of their recording "
            "with -o, one that all of them see."
        )
    _make_parent(parent)
    return parent / f"{name}-ranks-{place.launcher}"


def _make_parent(parent: Path) -> None:
    parent.mkdir(exist_ok=True)
    ignore = parent / ".gitignore"
    if not ignore.exists():  # recordings are no source; as .venv and .pytest_cache do it
        ignore.write_text("*\n", encoding="utf-8")


def _new(parent: Path, name: str) -> Path:
    _make_parent(parent)
    stem = f"{time.strftime('%Y-%m-%dT%H-%M-%S')}-{name}"
    for attempt in range(1, 1000):
        folder = parent / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            folder.mkdir()
        except FileExistsError:  # another run of the same second
            continue
        return folder
    raise FileExistsError(17, f"{stem} exists a thousand times")


def _clear(folder: Path, force: bool, place: Place) -> None:
    """Remove a recording that is there; of several ranks each removes its own."""
    own = folder / f"rank-{place.rank}"
    meta = (folder if place.leads else own) / "meta.json"
    if not meta.exists():
        return
    if not force:
        raise RecordingError(
            f"{folder} already holds a recording. Choose another folder with -o, or add --force "
            "to replace it."
        )
    if not _is_recording(meta):
        raise RecordingError(
            f"{meta} is not ours, and --force replaces recordings only. Choose another folder."
        )
    for old in folder.glob("rank-*"):
        number = old.name.removeprefix("rank-")
        others = number.isdigit() and int(number) < place.world  # they may be writing already
        if old == own or (place.leads and not others):
            shutil.rmtree(old)
    if not place.leads:
        return
    for name in ("meta.json", FINDINGS, DIAGNOSIS):
        (folder / name).unlink(missing_ok=True)


def _is_recording(meta: Path) -> bool:
    try:
        content = json.loads(meta.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "schema_version" in content
