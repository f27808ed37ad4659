"""``path:line`` in the user's own code, never inside a library; interned and cheap."""

from __future__ import annotations

import importlib.metadata
import sys
import sysconfig
from pathlib import Path
from types import CodeType, FrameType

_PACKAGE = str(Path(__file__).resolve().parent.parent)
# Libraries whose frames lie between the user's line and the call that is observed.
_LIBRARIES = (
    "torch",
    "functorch",
    "higher",
    "torchopt",
    "learn2learn",
    "betty",
    "torchmeta",
    "lightning",
    "pytorch_lightning",
    "accelerate",
    "optree",
)
# What they are installed as, where that is another name.
_INSTALLED_AS = {"betty": "betty-ml", "pytorch_lightning": "pytorch-lightning"}
# Code objects remembered at once.
_CODES_KNOWN = 1 << 14


class CallSites:
    """Interns call sites; the same line always gets the same small number."""

    def __init__(self) -> None:
        self.table: list[str] = []
        self._numbers: dict[tuple[int, int], int] = {}
        self._equal: dict[tuple[CodeType, int], int] = {}
        # By identity, for hashing a code object costs more than the lookup; each entry keeps its
        # code, so that no identity is ever reused.
        self._foreign: dict[int, tuple[CodeType, bool]] = {}
        standard = sysconfig.get_paths()["stdlib"]
        self._standard = standard
        self._packages = tuple(f"{root}/{name}/" for root in _site_roots() for name in _LIBRARIES)

    def here(self, depth: int = 1) -> int:
        """The number of the innermost user line calling us; -1 where there is none."""
        try:
            frame: FrameType | None = sys._getframe(depth)
        except ValueError:  # a thread that runs nothing but the call itself
            return -1
        known = self._foreign
        while frame is not None:
            code = frame.f_code
            entry = known.get(id(code))
            if not (entry[1] if entry is not None else self.foreign(code)):
                # (By the instruction, for a line has to be looked up in the code's table.)
                number = self._numbers.get((id(code), frame.f_lasti))
                return number if number is not None else self._number(frame)
            frame = frame.f_back
        return -1

    def name(self, number: int) -> str | None:
        """``path:line`` for a number given by :meth:`here`, or None for -1."""
        return self.table[number] if 0 <= number < len(self.table) else None

    def foreign(self, code: CodeType) -> bool:
        """Whether code belongs to a library (or to us) rather than to the user."""
        known = self._foreign.get(id(code))
        if known is None:
            if len(self._foreign) > _CODES_KNOWN:  # a program that compiles code as it goes
                self._foreign.clear()
                self._numbers.clear()
            known = self._foreign[id(code)] = (code, self._is_foreign(code.co_filename))
        return known[1]

    def _number(self, frame: FrameType) -> int:
        # A function defined anew in a loop has equal code, and is the same line.
        code, line = frame.f_code, frame.f_lineno
        number = self._equal.setdefault((code, line), len(self.table))
        if number == len(self.table):
            self.table.append(f"{code.co_filename}:{line}")
        self._numbers[id(code), frame.f_lasti] = number  # of a code that is kept, see above
        return number

    def _is_foreign(self, filename: str) -> bool:
        if filename.startswith("<"):
            # A notebook cell and stdin are the user's; frozen and generated code is not.
            return not filename.startswith(("<stdin>", "<ipython", "<string>"))
        if filename.startswith(_PACKAGE):
            return not filename.startswith(_PACKAGE + "/demo/")
        if filename.startswith(self._packages) or _installed_elsewhere(filename):
            return True
        return filename.startswith(self._standard) and "site-packages" not in filename


def _installed_elsewhere(filename: str) -> bool:
    """Whether a file is of a library that was installed into no usual place, or from a checkout.

    (A user's own package may have a library's name: it is not installed under that.)
    """
    for name in _LIBRARIES:
        places = getattr(sys.modules.get(name), "__path__", ())
        if any(filename.startswith(f"{place}/") for place in places):
            try:
                return bool(importlib.metadata.distribution(_INSTALLED_AS.get(name, name)))
            except importlib.metadata.PackageNotFoundError:
                return False
    return False


def _site_roots() -> list[str]:
    paths = sysconfig.get_paths()
    roots = {paths["purelib"], paths["platlib"]}
    roots.update(path for path in sys.path if path.endswith(("site-packages", "dist-packages")))
    return sorted(roots)
