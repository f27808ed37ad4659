"""Exceptions that came out of an inner loop, as findings."""

from __future__ import annotations

import re
from collections.abc import Iterator

from divergence_probe.record.schema import Event
from divergence_probe.rules.base import Frame, Rule
from divergence_probe.rules.finding import Finding, Mark, Severity
from divergence_probe.rules.raised_explanations import RAISED, explain

#: An exception about these is a symptom: what made the values so is for other rules to say.
_NON_FINITE = re.compile(r"\bnan\b|\binfs?\b|infinit|non-?finite|diverge", re.I)


#: The gradient was asked for tensors of which none is in the loss.
_NONE_USED = (
    "The inner gradient was asked for parameters of which the support loss depends on none: it was "
    "computed before they were made, or with others.",
    "loss = loss_fn(model(x, fast), y)   # in every inner step, with the weights of that step",
)


class RaisedInInnerLoop(Rule):
    """An exception was raised inside an inner loop.

    ## What it does
    Looks where the exception that ended the run was raised: inside the step loop, in a library's
    inner step or a ``torch.func`` transform, or in a forward of the fast weights. Exceptions of the
    script's own outside an inner loop are left alone. What torch and the libraries say is put into
    the words of the inner loop; an exception the script raises itself, or one about NaN, is a
    symptom without a cause of its own.

    ## Why it is bad
    The run ended there. The usual reasons are specific to nested loops (second derivatives, buffers
    under vmap, freed graphs, labels of the whole data set), and the message speaks of none of them.

    ## Example
    ```python
    features = encoder(x)
    for _ in range(steps):
        loss(head(features), y).backward()      # second step: the graph is freed
    ```

    ## Use instead
    ```python
    for _ in range(steps):
        loss(head(encoder(x)), y).backward()
    ```

    ## References
    facebookresearch/higher#4; pytorch/pytorch#116350.
    """

    code = "EX001"
    name = "raised-in-inner-loop"
    severity = Severity.ERROR
    cause = RAISED

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding for the exception that ended the run, if it came from an inner loop."""
        for event in frame.events("raised"):
            if event.data.get("inner_loop"):
                yield self._describe(frame, event)

    def _describe(self, frame: Frame, event: Event) -> Finding:
        data = event.data
        kind, message = str(data["type"]), str(data["message"])
        known = explain(message, str(data.get("module") or ""))
        layer = data.get("layer")
        names = tuple(data.get("unused") or ())
        cause: str | None = RAISED
        if known is not None:
            cause = known.cause
        elif data.get("own") or _NON_FINITE.search(message):
            cause = None
        said = _short(message)
        text = f"{kind} was raised in the inner loop: {said}"
        if known is not None:
            text = known.meaning
        fix = known.fix if known is not None else ""
        if names:
            text += f" Without a gradient: {_listed(names)}."
        if data.get("none_used"):
            text, fix = _NONE_USED
        return self.finding(
            text,
            cause=cause,
            severity=Severity.ERROR if known is None or known.error else Severity.WARNING,
            layer=layer,
            layers=(layer,) if layer else (),
            task=int(data.get("in_task", 0)),
            step=int(data.get("at_step", 0)),
            rank=frame.block.rank,
            evidence={"exception": kind, "message": said},
            fix=fix,
            marks=(Mark(event.site, f"{kind}: {said}"),) if event.site else (),
        )


def _short(message: str) -> str:
    line = message.strip().partition("\n")[0]
    return line if len(line) <= 160 else line[:157] + "..."


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
