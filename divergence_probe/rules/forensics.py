"""The first bad operation: what made something non-finite, and what to write instead."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from divergence_probe.record.schema import MISSING, Array, Event, Flags
from divergence_probe.rules.base import Frame, Rule
from divergence_probe.rules.finding import Finding, Mark, Severity
from divergence_probe.thresholds import Thresholds

_LOW = {
    "float16": "6.55e+04 largest, 4.9e-4 relative spacing",
    "bfloat16": "3.4e+38 largest, 3.9e-3 relative spacing",
}
# The finest relative spacing of numbers, 2 to the minus (bits of the fraction + 1).
_SPACING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
# float32 overflows from 3.4e38: an operation after numbers beyond this only ends an explosion, and
# so does one on weights a decade larger than when the task began (the bound of norm-growth).
_EXPLODED = 1e15
_GROWN = 10.0
# A base that a few outer steps in a row leave as it is does not just happen to stand still.
_OUTER_STEPS = 3


class _Forensic(Rule):
    """Shared by the rules of this file: one event, one finding."""

    severity = Severity.ERROR
    fixes: ClassVar[dict[str, str]] = {}

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding for every event that is this rule's."""
        for event in frame.events("forensics"):
            if not _exploded(event.data) and self.takes(event.data):
                yield self._describe(frame, event)

    def takes(self, data: dict[str, Any]) -> bool:
        """Whether the event is one of this rule's kind."""
        raise NotImplementedError

    def message(self, data: dict[str, Any]) -> str:
        """The sentence, without where it was seen."""
        raise NotImplementedError

    def _describe(self, frame: Frame, event: Event) -> Finding:
        spoken = frame.block.layout.spoken
        data = event.data
        told = {**data, "layer": data["layer"] and spoken(data["layer"])}
        told["layers"] = [spoken(layer) for layer in data["layers"]]
        fix = self.fixes.get(data["operation"], self.fixes.get("", ""))
        evidence: dict[str, float | str] = {
            "operation": data["operation"],
            "phase": data["phase"],
            "dtype": data["dtype"] or data["input_dtype"],
            "input_min": data["minimum"],
            "input_max": data["maximum"],
            "input_zeros": float(data["zeros"]),
            "input_nonfinite": float(data["nonfinite"]),
            "input_elements": float(data["elements"]),
        }
        if not data["certain"]:
            evidence["seen"] = "inferred from the graph's shape, its numbers were freed already"
        return self.finding(
            self.message(told),
            rank=frame.block.rank,
            layer=data["layer"],
            layers=tuple(data["layers"]),
            task=data["in_task"] if data["in_task"] >= 0 else None,
            step=data["in_step"] if data["in_step"] >= 0 else None,
            phase="support" if data["in_step"] >= 0 else None,
            evidence=evidence,
            fix=fix,
            marks=_marks(event, data),
        )


def _marks(event: Event, data: dict[str, Any]) -> tuple[Mark, ...]:
    operation = data["operation"]
    what = {
        "input": f"non-finite data enters {operation}",
        "update": "the update makes weights non-finite",
        "gradient": "the gradient of the step before overflowed",
    }.get(data["what"], f"{operation}: {_range(data)}")
    marks = []
    if event.site:
        marks.append(Mark(event.site, what))
    taken = data["gradient_site"]
    if taken and taken != event.site:
        marks.append(Mark(taken, "the gradient is taken here" if event.site else what))
    return tuple(marks)


def _range(data: dict[str, Any]) -> str:
    if not data["elements"] or math.isnan(data["minimum"]):
        return "input not known"
    zeros = f", {data['zeros']} exact zeros" if data["zeros"] else ""
    return f"inputs {data['minimum']:.3g} to {data['maximum']:.3g}{zeros}"


def _exploded(data: dict[str, Any]) -> bool:
    ends_one = data["largest"] > _EXPLODED or data["growth"] > _GROWN
    return bool(data["what"] != "input" and ends_one)


def _in(data: dict[str, Any]) -> str:
    return f" in {data['layer']}" if data["layer"] and data["phase"] == "forward" else ""


def _low(data: dict[str, Any]) -> bool:
    return data["dtype"] in _LOW and data["what"] != "input"


class NonFiniteInput(_Forensic):
    """NaN or infinity comes in with the data.

    ## What it does
    When an inner loss is not finite, reads the loss's autograd graph from its start and finds the
    first operation that was given non-finite values by a tensor no weight has touched.

    ## Why it is bad
    One NaN feature makes the loss NaN, its gradient NaN in every weight and, through the outer
    step, every later task.

    ## Example
    ```python
    x = (x - x.mean(0)) / x.std(0)               # a constant column: 0 / 0
    ```

    ## Use instead
    ```python
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-6)
    x = torch.nan_to_num(x)                      # or drop the rows
    ```

    ## References
    pytorch/pytorch#160016 on naming the forward origin of a NaN.
    """

    code = "FX001"
    name = "non-finite-input"
    cause = "nonfinite-input"
    fixes: ClassVar[dict[str, str]] = {
        "": "assert torch.isfinite(x).all() and torch.isfinite(y).all()   # where tasks are made\n"
        "x = torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)      # or drop those rows"
    }

    def takes(self, data: dict[str, Any]) -> bool:
        """Data that came in bad."""
        return bool(data["what"] == "input")

    def message(self, data: dict[str, Any]) -> str:
        """What came in, and where."""
        many = (
            f"{data['nonfinite']} of {data['elements']} values"
            if data["nonfinite"]
            else "an operand"
        )
        where = f"{data['operation']}{_in(data)}"
        return (
            f"what enters the loss is not finite, and no gradient goes through it: {many} given to "
            f"{where} (data, or what was computed of it outside the graph)"
        )


class SingularForward(_Forensic):
    """An operation of the forward makes NaN or infinity out of finite numbers.

    ## What it does
    When an inner loss is not finite, finds the first operation whose inputs are finite and whose
    output is not, and reports their range. Inputs so large that any operation overflows are the
    end of an explosion and are left to the rules on growth.

    ## Why it is bad
    log, division and sqrt at 0 are right on nearly all data: the loop runs until one sample is on
    the edge, and from then on every weight is NaN.

    ## Example
    ```python
    loss = -(onehot * torch.softmax(logits, 1).log()).sum(1).mean()    # 0 * log(0)
    ```

    ## Use instead
    ```python
    loss = F.cross_entropy(logits, y)
    ```

    ## References
    pytorch/pytorch#160016; pytorch/pytorch#182156 on telling producer from propagator.
    """

    code = "FX002"
    name = "singular-forward-operation"
    cause = "singular-forward"
    fixes: ClassVar[dict[str, str]] = {
        "log": "loss = F.cross_entropy(logits, y)      # or log_softmax, logsigmoid, xlogy;\n"
        "loss = -(p.clamp_min(1e-8).log() * t)  # at least keep log away from 0",
        "div": "y = a / (b + 1e-6)      # or b.clamp(min=1e-6): the divisor reaches exactly 0",
        "": "keep the operation's input away from the point where it is infinite: clamp it, or add "
        "an eps",
    }

    def takes(self, data: dict[str, Any]) -> bool:
        """A forward operation in a wide enough type."""
        return bool(data["what"] == "operation" and data["phase"] == "forward" and not _low(data))

    def message(self, data: dict[str, Any]) -> str:
        """The operation and its inputs."""
        return (
            f"{data['operation']}{_in(data)} makes non-finite values of finite ones "
            f"({_range(data)}) in the forward"
        )


class SingularBackward(_Forensic):
    """The forward is finite, and the derivative of one of its operations is not.

    ## What it does
    Takes the gradient once more under node hooks (once at each line whose graph holds an operation
    with a singular derivative, and after a fault) and names the first node that makes non-finite
    gradients of finite ones. For a meta-gradient this may be the derivative of a derivative: norm
    has a finite first derivative at 0 in torch, and no second one.

    ## Why it is bad
    The loss looks healthy at the very step that destroys the weights. `where` does not help: the
    branch that is not taken is differentiated too, and 0 * inf is NaN.

    ## Example
    ```python
    d = ((a - b) ** 2).sum(-1).sqrt()            # a == b: derivative 1 / (2 * 0)
    ```

    ## Use instead
    ```python
    d = (((a - b) ** 2).sum(-1) + 1e-12).sqrt()
    ```

    ## References
    pytorch/pytorch#23395 on where and NaN gradients.
    """

    code = "FX003"
    name = "singular-backward-operation"
    cause = "singular-backward"
    fixes: ClassVar[dict[str, str]] = {
        "sqrt": "y = (x + 1e-12).sqrt()                   # the derivative at 0 is infinite\n"
        "y = torch.where(x > 0, x, 1.0).sqrt() * (x > 0)   # or a safe value before it",
        "norm": "penalty = (w.square().sum() + 1e-12).sqrt()   # or w.square().sum()",
        "pow": "y = (x.abs() + 1e-6) ** p      # or a smooth form: (x * x + 1e-6) ** (p / 2)",
        "std": "s = (x.var(unbiased=False) + 1e-6).sqrt()",
        "": "x = torch.where(ok, x, 1.0)   # a safe input before the operation, not only after",
    }

    def takes(self, data: dict[str, Any]) -> bool:
        """A backward, first or second."""
        backward = data["phase"] in ("backward", "second backward") and not _low(data)
        return bool(data["what"] == "operation" and backward)

    def message(self, data: dict[str, Any]) -> str:
        """The operation, which derivative, and its inputs."""
        order = "second derivative" if data["phase"] == "second backward" else "derivative"
        verb = "is" if data["certain"] else "is most likely"
        reached = f", and the gradient of {data['layers'][0]} not finite" if data["layers"] else ""
        return f"the {order} of {data['operation']} {verb} infinite here ({_range(data)}){reached}"


class ZeroSecondMoment(_Forensic):
    """A differentiable Adam or RMSprop takes the root of a second moment that is exactly zero.

    ## What it does
    As FX003, where the operation with the infinite derivative lies between an inner gradient and
    the weights it updates.

    ## Why it is bad
    Units that never fire and features that never occur have a gradient of exactly 0. The update is
    0 / (0 + eps) and harmless; its derivative is NaN, and with it the whole meta-gradient.

    ## Example
    ```python
    update = lr * m / (v.sqrt() + eps)
    ```

    ## Use instead
    ```python
    update = lr * m / (v + eps_root).sqrt()      # torchopt: MetaAdam(net, lr, eps_root=1e-8)
    ```

    ## References
    facebookresearch/higher#125; metaopt/torchopt#26.
    """

    code = "FX004"
    name = "zero-second-moment"
    cause = "adam-sqrt-zero"
    fixes: ClassVar[dict[str, str]] = {
        "": "update = lr * m / (v + 1e-8).sqrt()      # eps under the root, not beside it\n"
        "inner = torchopt.MetaAdam(net, lr=lr, eps_root=1e-8)   # with TorchOpt"
    }

    def takes(self, data: dict[str, Any]) -> bool:
        """A singular derivative in the update."""
        return bool(data["what"] == "operation" and data["phase"] == "update" and not _low(data))

    def message(self, data: dict[str, Any]) -> str:
        """The root and what was under it."""
        zeros = f"{data['zeros']} of {data['elements']} second moments are exactly 0"
        seen = zeros if data["zeros"] else "second moments reach 0"
        return (
            f"the inner optimizer's {data['operation']} has an infinite derivative ({seen}): "
            "the meta-gradient is not finite"
        )


class LowPrecision(_Forensic):
    """A half-precision number overflowed, or was rounded to zero where that is fatal.

    ## What it does
    As FX002, where the operation's output is float16 or bfloat16; and where a finite gradient
    and a finite weight in such a type make a non-finite weight (Adam's eps of 1e-8 is 0 in
    float16: 0 / 0), or a gradient in float16 is not finite, no operation's derivative can have made
    it so, and the step was taken all the same.

    ## Why it is bad
    float16 ends at 65504: squares overflow from 256 on, attention scores sooner.

    ## Example
    ```python
    loss = ((net.half()(x) - y) ** 2).mean()     # (420) ** 2 = 176400 > 65504
    ```

    ## Use instead
    ```python
    loss = F.mse_loss(net(x).float(), y.float())  # or bfloat16, or autocast with float32 weights
    ```

    ## References
    Micikevicius et al., Mixed Precision Training, ICLR 2018 (arXiv:1710.03740).
    """

    code = "FX005"
    name = "low-precision-overflow"
    cause = "low-precision"
    fixes: ClassVar[dict[str, str]] = {
        "update": "learner = copy.deepcopy(model).float()   # step in float32, compute in half\n"
        "opt = torch.optim.Adam(learner.parameters(), lr=lr, eps=1e-4)   # or an eps float16 has",
        "gradient": "scaler = torch.amp.GradScaler()   # lowers its scale and skips such a step\n"
        "scaler.scale(loss).backward(); scaler.step(opt); scaler.update()\n"
        "net = net.to(torch.bfloat16)         # or the range of float32",
        "": "with torch.autocast('cuda', dtype=torch.bfloat16):   # the range of float32\n"
        "loss = F.mse_loss(prediction.float(), target.float())   # or this operation in float32",
    }

    def takes(self, data: dict[str, Any]) -> bool:
        """Anything made in half precision."""
        return _low(data)

    def message(self, data: dict[str, Any]) -> str:
        """The operation, its type and its inputs."""
        dtype = data["dtype"]
        if data["what"] == "update":
            return f"the update makes {dtype} weights non-finite (finite before: {_range(data)})"
        if data["what"] == "gradient":
            layer = data["layers"][0] if data["layers"] else "the weights"
            return f"the gradient of {layer} overflows {dtype} in the backward ({_LOW[dtype]})"
        return f"{data['operation']}{_in(data)} overflows {dtype} ({_range(data)}; {_LOW[dtype]})"


@dataclass
class _StillBase:
    """A base that no outer step has moved so far."""

    steps: int = 0
    moved: bool = False
    finding: Finding | None = None


class BelowOneUlp(Rule):
    """Updates are smaller than the spacing of the weights: nothing moves.

    ## What it does
    Looks at float16 and bfloat16 weights for tasks in which most of every step is lost: updates
    that are exactly zero although there are gradients, or that go less than half as far down the
    gradient as the learning rate says because that is below half the spacing of the weights.

    Outer steps count where not one of a whole run moved a weight, in any precision: meta-training
    then does nothing. (Inner steps in float32 that are rounded away are LR002's.)

    ## Why it is bad
    bfloat16 keeps 8 bits: a weight of 0.5 moves in steps of 0.004. A smaller update is rounded
    away, and the loop runs without adapting.

    ## Example
    ```python
    net = net.to(torch.bfloat16)
    p = p - 1e-3 * g                             # |1e-3 * g| below 0.002 is lost
    ```

    ## Use instead
    ```python
    net = net.float()                            # and autocast for the forward
    ```

    ## References
    Micikevicius et al., Mixed Precision Training, ICLR 2018, section 3.1 (arXiv:1710.03740).
    """

    code = "FX006"
    name = "update-below-one-ulp"
    severity = Severity.WARNING
    cause = "low-precision"

    def __init__(self, thresholds: Thresholds) -> None:
        super().__init__(thresholds)
        self._moving: set[tuple[int, int]] = set()
        self._outer: dict[tuple[int, int], _StillBase] = {}

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding a task of whose every step most is lost, at its first."""
        block = frame.block
        self._note_outer(frame)
        spacing = np.asarray([_SPACING.get(p.dtype, 0.0) for p in block.layout.parameters])
        if not spacing.any() or not len(block):
            return
        gradient, update = block.parameters["gradient_norm"], block.parameters["update_norm"]
        present = (gradient > 0) & (update != MISSING) & (spacing > 0)
        # as good as nothing: of all elements less than one in ten thousand went one unit
        still = present & (update <= 0.01 * spacing * block.parameters["norm_before"])
        lost = np.where((still == present).all(1)[:, None], still, False)
        lost |= self._rounded(frame, present, spacing)
        # Of the first-order change of the loss, each parameter's part is its squared gradient.
        square = np.where(present, gradient, 0.0) ** 2
        with np.errstate(all="ignore"):
            share = np.where(lost, square, 0.0).sum(1) / square.sum(1)
        idle = (block.scalars["learning_rate"] == 0) | frame.flagged("zero")  # a warm-up, say
        hit = frame.support & present.any(1) & (share > 0.5) & ~idle
        # Close to a minimum updates are small by right: a task that has moved is left alone.
        rank = block.rank
        moving = np.flatnonzero(frame.by_task.any(frame.support & ~hit)).tolist()
        self._moving |= {(rank, frame.by_task.tasks[position]) for position in moving}
        for row in frame.first_rows(hit):
            if (rank, int(frame.task[row])) in self._moving:
                continue
            column = int(np.argmax(np.where(lost[row], gradient[row], -1.0)))
            info = block.layout.parameters[column]
            moved = float(update[row, column])
            yield self.at(
                frame,
                row,
                f"{'no' if moved == 0 else 'hardly a'} {info.dtype} weight of "
                f"{frame.parameter(column)} moved at step {int(frame.step[row])}, with a gradient "
                f"of {gradient[row, column]:.3g}: updates are below half a unit in the last place",
                "the update is rounded away",
                layer=frame.layer(column),
                evidence={
                    "dtype": info.dtype,
                    "gradient_norm": float(gradient[row, column]),
                    "update_norm": moved,
                    "lost_share": float(share[row]),
                },
                fix="net = net.float()   # keep weights in float32, autocast the forward",
            )
        self._moving -= {(rank, task) for task in block.ended}

    def finish(self) -> Iterator[Finding]:
        """One finding for a base that no outer step has moved."""
        for base in self._outer.values():
            if not base.moved and base.steps >= _OUTER_STEPS and base.finding is not None:
                yield base.finding

    def _note_outer(self, frame: Frame) -> None:
        """Note whether the outer steps of a frame moved their base."""
        block = frame.block
        gradient, update = block.parameters["gradient_norm"], block.parameters["update_norm"]
        rate = block.scalars["learning_rate"]
        taken = np.where(np.isfinite(rate), rate > 0, frame.flagged("rounded"))
        due = (gradient > 0) & np.isfinite(gradient) & (update != MISSING)
        for row in np.flatnonzero(frame.outer).tolist():
            base = self._outer.setdefault((block.rank, block.layout.index), _StillBase())
            base.moved |= bool((update[row] != 0)[update[row] != MISSING].any())
            if base.moved or not taken[row] or not due[row].any():
                continue
            base.steps += 1
            if base.finding is None:
                base.finding = self._still_base(frame, row)

    def _still_base(self, frame: Frame, row: int) -> Finding:
        """What is said of a base from its first outer step on."""
        parameters, rate = frame.block.parameters, float(frame.block.scalars["learning_rate"][row])
        column = int(np.argmax(parameters["gradient_norm"][row]))
        dtype = frame.block.layout.parameters[column].dtype
        step = f" and a rate of {rate:.3g}" if math.isfinite(rate) else ""
        fix = "Raise the outer learning rate"
        return self.at(
            frame,
            row,
            "no outer step moves a weight, with a gradient of "
            f"{parameters['gradient_norm'][row, column]:.3g} of {frame.parameter(column)}{step}: "
            f"updates are below half a unit in the last place of {dtype}",
            "the update is rounded away",
            layer=frame.layer(column),
            evidence={"dtype": dtype},
            fix=f"net = net.float()   # keep weights in float32\n# or: {fix.lower()}"
            if dtype in _SPACING
            else f"{fix}.",
        )

    def _rounded(self, frame: Frame, present: Flags, spacing: Array) -> Flags:
        """``[S, P]`` updates that went less than half as far as the step's rate says.

        The rate is the learning rate, or the largest that any parameter shows (of small weights,
        whose spacing is finer). Optimizers that rescale give other rates for other reasons: only
        where that rate, too, would move a typical weight by less than half its spacing is it
        rounding.
        """
        parameters = frame.block.parameters
        known = frame.block.scalars["learning_rate"]
        rates = np.where(present & np.isfinite(parameters["step_rate"]), parameters["step_rate"], 0)
        rate = np.fmax(rates.max(1, initial=0.0), np.where(np.isfinite(known), known, 0.0))[:, None]
        due = rate * parameters["gradient_norm"]
        below = due < spacing / 2 * parameters["norm_before"]
        return np.asarray(present & below & (rates < 0.5 * rate))


__all__ = [
    "BelowOneUlp",
    "LowPrecision",
    "NonFiniteInput",
    "SingularBackward",
    "SingularForward",
    "ZeroSecondMoment",
]
