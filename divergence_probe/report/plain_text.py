"""Text for streams whose encoding lacks box characters: each is swapped for one ASCII character."""

from __future__ import annotations

# Each glyph and, at the same position, the ASCII character that takes its cell.
_GLYPHS = str.maketrans("╭╰├┬─│┆▁▂▃▄▅▆▇█·…→×–‖σ", "+++^-|:_.-=+*%#-~>x-|s", "\u2060")


def fits(text: str, encoding: str) -> bool:
    """Whether ``encoding`` can write ``text``; False for an encoding Python does not know."""
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def for_encoding(text: str, encoding: str) -> str:
    """``text`` as ``encoding`` can write it; one cell stays one cell, so that columns stay aligned.

    Letters that ``encoding`` lacks become escapes, in XML and HTML character references.
    """
    if fits(text, encoding):
        return text
    markup = text.startswith("<")
    if not markup:
        text = text.translate(_GLYPHS)
    try:
        return text.encode(encoding, "xmlcharrefreplace" if markup else "backslashreplace").decode(
            encoding
        )
    except LookupError:
        return text.encode("ascii", "backslashreplace").decode("ascii")
