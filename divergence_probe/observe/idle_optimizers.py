"""Optimizers that step and never have a gradient to step with: what was to reach them does not.

Told by the line that steps, for optimizers come and go with the functions that make them; and only
at the end, for one may wait a long time for its turn.
"""

from __future__ import annotations

from divergence_probe.observe.session import Session

# Scheduler warm-ups step once for nothing, on purpose.
_LEAST_STEPS = 3


class IdleOptimizers:
    """Counts, for each line, the steps without a single gradient, as long as there is no other."""

    def __init__(self, session: Session) -> None:
        self._session = session
        #: by line: how many steps, and of which optimizer
        self._idle: dict[int, tuple[int, str]] = {}
        self._busy: set[int] = set()
        session.closing.append(self.close)

    def note(self, site: int, optimizer: str, idle: bool) -> None:
        """An optimizer stepped, with or without gradients.

        Args:
            site: number of the line.
            optimizer: its class's name.
            idle: whether not one of its parameters had a gradient or was written to, though some
                ask for one (those that do not are frozen).
        """
        if idle and site not in self._busy:
            self._idle[site] = self._idle.get(site, (0, ""))[0] + 1, optimizer
        elif not idle and site not in self._busy:
            self._busy.add(site)
            self._idle.pop(site, None)

    def close(self) -> None:
        """The run is over."""
        for site, (steps, optimizer) in self._idle.items():
            if steps >= _LEAST_STEPS:
                self._session.event(
                    "optimizer-without-gradient", None, site, steps=steps, optimizer=optimizer
                )
