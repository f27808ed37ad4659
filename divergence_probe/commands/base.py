"""What a command is: a name, a parser and a run; its docstring is its help text."""

from __future__ import annotations

import argparse
import difflib
import inspect
from collections.abc import Sequence
from typing import ClassVar, NoReturn


class Command:
    """One command of ``probe``. Subclass it in a new file under ``commands/``.

    The docstring's first line is the summary in ``probe --help``; the whole of it introduces
    ``probe COMMAND --help``.
    """

    name: ClassVar[str]
    usage: ClassVar[str | None] = None
    #: Where the command stands in ``probe --help``.
    order: ClassVar[int] = 100

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's options and arguments."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Do it; returns the exit code.

        Raises:
            ProbeError: with what happened, where, and what to do.
        """
        raise NotImplementedError

    def main(self, arguments: Sequence[str]) -> int:
        """Parse ``arguments`` (those after the command's name) and run."""
        parser = self.parser()
        return self.run(self.parse(parser, list(arguments)))

    def parse(self, parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
        """Parse; a command whose arguments are not all its own splits them off here."""
        return parser.parse_args(arguments)

    def parser(self) -> argparse.ArgumentParser:
        """The command's parser, ready to use."""
        parser = _Parser(
            prog=f"probe {self.name}",
            usage=self.usage,
            description=inspect.cleandoc(self.__doc__ or ""),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # an option added later must not change what a CI file means
        )
        self.prepare_parser(parser)
        return parser

    @classmethod
    def summary(cls) -> str:
        """The first line of the docstring."""
        return inspect.cleandoc(cls.__doc__ or "").partition("\n")[0]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong, the closest option, and where to look; exit with 2."""
        unknown = message.removeprefix("unrecognized arguments: ").split(" ")[0].partition("=")[0]
        options = [text for action in self._actions for text in action.option_strings]
        meant = ""
        if unknown != message and unknown.startswith("-"):
            close = difflib.get_close_matches(unknown, options, n=1)
            meant = f". Did you mean {close[0]}?" if close else ""
        self.exit(2, f"{self.prog}: {message}{meant}\n`{self.prog} --help` shows the options.\n")
