"""Settings of a project, from pyproject.toml or setup.cfg of the working directory.

They stand in ``[tool.divergence_probe]`` or ``[divergence_probe]``; the command line wins.
"""

from __future__ import annotations

import configparser
import difflib
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from divergence_probe.errors import UsageError

_KEYS = ("select", "ignore", "intent", "fail-on", "thresholds")
_LEVELS = ("error", "warning", "never")


@dataclass(frozen=True)
class Config:
    """A project's settings; empty where it has none.

    Attributes:
        source: ``"pyproject.toml [tool.divergence_probe]"`` or the like; empty for none.
        select: rule codes or prefixes to keep.
        ignore: rule codes or prefixes to drop.
        intent: what is meant.
        fail_on: severity that makes the exit code 1, or None.
        thresholds: overrides, each as ``NAME=VALUE``.
    """

    source: str = ""
    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    intent: tuple[str, ...] = ()
    fail_on: str | None = None
    thresholds: tuple[str, ...] = field(default=())


def read_config(folder: Path) -> Config:
    """The settings found in ``folder``; pyproject.toml before setup.cfg.

    Raises:
        UsageError: a file cannot be read, or a key or value is not known.
    """
    for name, read in (("pyproject.toml", _pyproject), ("setup.cfg", _setup_cfg)):
        path = folder / name
        if not path.is_file():
            continue
        try:
            section, values = read(path)
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, configparser.Error) as error:
            reason = " ".join(str(error).split())
            raise UsageError(
                f"{path} cannot be read: {reason}. Correct it, or add --isolated to do without."
            ) from error
        if values is not None:
            return _config(f"{name} [{section}]", values)
    return Config()


def _pyproject(path: Path) -> tuple[str, dict[str, Any] | None]:
    section = "tool.divergence_probe"
    values: Any = tomllib.loads(path.read_text(encoding="utf-8"))
    for key in section.split("."):
        values = values.get(key)
        if values is None:
            break
        if not isinstance(values, dict):
            raise UsageError(
                f"{path}: {key} is {values!r}; write a table, [{section}], or add --isolated to do "
                "without."
            )
    return section, values


def _setup_cfg(path: Path) -> tuple[str, dict[str, Any] | None]:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(path.read_text(encoding="utf-8"), source=str(path))
    section = "divergence_probe"
    return section, dict(parser[section]) if parser.has_section(section) else None


def _config(source: str, values: dict[str, Any]) -> Config:
    known = {key.replace("_", "-"): value for key, value in values.items()}
    for key in known:
        if key not in _KEYS:
            close = difflib.get_close_matches(key, _KEYS, n=1)
            meant = f" Did you mean {close[0]!r}?" if close else ""
            raise UsageError(f"{source}: there is no key {key!r}.{meant} Keys: {', '.join(_KEYS)}.")
    level = known.get("fail-on")
    if level is not None and level not in _LEVELS:
        raise UsageError(f"{source}: fail-on is {level!r}; choose from: {', '.join(_LEVELS)}.")
    return Config(
        source,
        select=_texts(source, "select", known.get("select", ())),
        ignore=_texts(source, "ignore", known.get("ignore", ())),
        intent=_texts(source, "intent", known.get("intent", ())),
        fail_on=level,
        thresholds=_thresholds(source, known.get("thresholds", ())),
    )


def _texts(source: str, key: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        value = value.replace(",", " ").split()
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise UsageError(f"{source}: {key} is {value!r}; write a list of texts.")
    return tuple(value)


def _thresholds(source: str, value: object) -> tuple[str, ...]:
    """A table of numbers (TOML) or ``NAME=VALUE`` texts (setup.cfg)."""
    if not isinstance(value, dict):
        return _texts(source, "thresholds", value)
    for name, number in value.items():
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise UsageError(f"{source}: thresholds.{name} is {number!r}; write a number.")
    return tuple(f"{name}={number!r}" for name, number in value.items())
