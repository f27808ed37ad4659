"""``path:line`` in the user's own code, never inside a library; interned and cheap."""

from __future__ import annotations

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


class CallSites:
    """Interns call sites; the same line always gets the same small number."""

    def __init__(self) -> None:
        self.table: list[str] = []
        self._numbers: dict[tuple[CodeType, int], int] = {}
        self._foreign: dict[CodeType, bool] = {}
        standard = sysconfig.get_paths()["stdlib"]
        self._standard = standard
        self._packages = tuple(f"{root}/{name}/" for root in _site_roots() for name in _LIBRARIES)

    def here(self, depth: int = 1) -> int:
        """The number of the innermost user line calling us; -1 where there is none."""
        frame: FrameType | None = sys._getframe(depth)
        while frame is not None:
            code = frame.f_code
            if not self.foreign(code):
                return self._number(code, frame.f_lineno)
            frame = frame.f_back
        return -1

    def name(self, number: int) -> str | None:
        """``path:line`` for a number given by :meth:`here`, or None for -1."""
        return self.table[number] if 0 <= number < len(self.table) else None

    def foreign(self, code: CodeType) -> bool:
        """Whether code belongs to a library (or to us) rather than to the user."""
        known = self._foreign.get(code)
        if known is None:
            known = self._foreign[code] = self._is_foreign(code.co_filename)
        return known

    def _number(self, code: CodeType, line: int) -> int:
        key = (code, line)
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self.table)
            self.table.append(f"{code.co_filename}:{line}")
        return number

    def _is_foreign(self, filename: str) -> bool:
        if filename.startswith("<"):
            # A notebook cell and stdin are the user's; frozen and generated code is not.
            return not filename.startswith(("<stdin>", "<ipython", "<string>"))
        if filename.startswith(_PACKAGE):
            return not filename.startswith(_PACKAGE + "/demo/")
        if filename.startswith(self._packages):
            return True
        return filename.startswith(self._standard) and "site-packages" not in filename


def _site_roots() -> list[str]:
    paths = sysconfig.get_paths()
    roots = {paths["purelib"], paths["platlib"]}
    roots.update(path for path in sys.path if path.endswith(("site-packages", "dist-packages")))
    return sorted(roots)
