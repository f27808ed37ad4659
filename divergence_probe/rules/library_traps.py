"""Silent faults where two features of torch or a library do not go together."""

from __future__ import annotations

from collections.abc import Iterator

from divergence_probe.rules.base import Frame, Rule
from divergence_probe.rules.finding import Finding, Mark, Severity


class CompiledBaseWeights(Rule):
    """The fast model runs the compiled base: adapting it changes nothing it computes.

    ## What it does
    Notices a patched or copied model that carries the base's compiled call, and inner gradients
    that are absent for every parameter while the loss stays the same.

    ## Why it is bad
    Forward passes of the fast model use the base's weights. No error is raised; the loss never
    moves.

    ## Example
    ```python
    net.compile()
    with higher.innerloop_ctx(net, opt) as (fnet, diffopt):
        diffopt.step(loss(fnet(x), y))
    ```

    ## Use instead
    Compile nothing before the model is patched, or compile the function that contains the whole
    inner loop.

    ## References
    PyTorch documentation of ``nn.Module.compile``: the compiled call is stored on the module and
    copied with it.
    """

    code = "COMP001"
    name = "compiled-base-weights"
    severity = Severity.ERROR
    cause = "compiled-base-weights"

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding a task that starts on a compiled copy, or adapts without any gradient."""
        for event in frame.events("task-start"):
            if event.data.get("compiled"):
                yield self.finding(
                    "the fast model carries the base model's compiled call: its forward runs the "
                    "base's weights, whatever the inner loop does",
                    task=event.task,
                    marks=(Mark(event.site, "patched after the model was compiled"),)
                    if event.site
                    else (),
                    fix="Patch or copy the model before net.compile(), or do not compile it.",
                )
        for event in frame.events("runs-base-weights"):
            compiled = bool(event.data.get("compiled"))
            yield self.finding(
                "the loss depends on the base model's weights, not on the copy's that are adapted: "
                + (
                    "the copy carries the base's compiled call"
                    if compiled
                    else "no parameter of the copy gets a gradient"
                ),
                cause=self.cause if compiled else "no-parameter-change",
                task=event.task if event.task >= 0 else None,
                marks=(Mark(event.site, "this loss was computed with the base's weights"),)
                if event.site
                else (),
                fix="Copy the model before compiling it."
                if compiled
                else "Compute the loss with the model that is adapted.",
            )


class CheckpointRecompute(Rule):
    """Activation checkpointing recomputes with other weights than the forward had.

    ## What it does
    Compares the parameters a checkpointed region sees in its forward with those it sees when the
    backward runs it again.

    ## Why it is bad
    Loops that swap weights in for the forward only (``functional_call``) have swapped them out by
    then: gradients are those of another function. No error is raised.

    ## Example
    ```python
    loss = F.mse_loss(functional_call(net, fast, (x,)), y)   # net checkpoints a block
    grads = torch.autograd.grad(loss, list(fast.values()))
    ```

    ## Use instead
    Switch checkpointing off in the inner loop, or keep the weights in place until the backward is
    done.

    ## References
    PyTorch documentation of ``torch.utils.checkpoint``: the function must behave identically.
    """

    code = "CKPT001"
    name = "checkpoint-recomputes-with-other-weights"
    severity = Severity.ERROR
    cause = "checkpoint-recompute"

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding for every event of the checkpoint watch."""
        for event in frame.events("checkpoint-recompute"):
            layer = event.data.get("layer")
            where = f" ({frame.called([layer])})" if layer else ""
            yield self.finding(
                f"a checkpointed region{where} was recomputed in the backward with other "
                "parameter values than in its forward",
                task=event.task if event.task >= 0 else None,
                layer=layer,
                layers=(layer,) if layer else (),
                marks=(Mark(event.site, "checkpointed here"),) if event.site else (),
                fix="Switch checkpointing off inside the inner loop.",
            )
