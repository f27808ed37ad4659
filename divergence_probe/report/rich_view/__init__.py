"""The parts of the terminal report, as rich text laid out for a given width.

rich numbers its styles from a random number it draws as it is imported. It is imported here first,
in a way that gives the number back: a printed diagnosis leaves the user's random draws as they are.
"""

import random

_state = random.getstate()
try:
    from rich.console import Console
finally:
    random.setstate(_state)

__all__ = ["Console"]
