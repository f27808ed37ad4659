"""Hand-made diagnoses for the report tests: no torch, no recording, just the plain data."""

from __future__ import annotations

import math

from divergence_probe.diagnosis.diagnosis import (
    BatchNormRow,
    Diagnosis,
    ExceptionReport,
    Health,
    Intervention,
    NormTrace,
    RootCause,
    Summary,
)
from divergence_probe.rules.finding import Finding, Mark, Severity

HOSTILE = (
    "[bold red]x[/] <script>alert(1)</script> {{7*7}} \x1b[31m\x07\x00\u202e|`*_ \ud800 "
    "'q' \"d\" 漢字 é % ::error::"
)
SCRIPT = """\
import higher


def evaluate(net, tasks, inner_lr=0.01):
    net.eval()
    inner = torch.optim.SGD(net.parameters(), lr=inner_lr)
    for x_spt, y_spt, x_qry, y_qry in tasks:
        with higher.innerloop_ctx(net, inner, track_higher_grads=False) as (fnet, diffopt):
            for _ in range(5):
                diffopt.step(F.cross_entropy(fnet(x_spt), y_spt))  # adapt
            print(fnet(x_qry))
"""
_BASE = (9.5937, 9.7012, 410.25, 8.8e5, 6.2e11, 5.4257e13)


def norms(count: int = 12) -> tuple[NormTrace, ...]:
    """Exploding weights, a nan, an inf, a bias that starts at 0 and quiet BatchNorm weights."""
    exploding = [
        NormTrace(
            f"features.conv{i + 1}.weight", 3, tuple(b**1 / 3**i for b in _BASE), first_to_grow=1
        )
        for i in range(3)
    ]
    odd = [
        NormTrace(
            "classifier.weight", 3, (1.03, 1.1, 7.9, 1e3, math.inf, math.nan), first_to_grow=1
        ),
        NormTrace("classifier.bias", 3, (0.0, 0.1, 0.7, 5.0, 60.0, 4e3)),
    ]
    quiet = [
        NormTrace(f"features.norm{i + 1}.weight", 3, (8.0, 8.0, 8.01, 8.0, 8.0, 8.02))
        for i in range(count)
    ]
    return (*exploding, *odd, *quiet)


def batch_norm(mode: str = "eval", distance: float = 18.4) -> tuple[BatchNormRow, ...]:
    """Four BatchNorm layers with statistics ``distance`` batch standard deviations away."""
    modes = {"support": mode, "query": mode}
    return tuple(
        BatchNormRow(
            f"features.norm{i + 1}", modes, 0, distance / (i + 1), 0.0031 * (i + 1), "cloned", 405
        )
        for i in range(4)
    )


def diverged(path: str = "eval.py", confidence: str = "confirmed") -> Diagnosis:
    """The original story: eval mode with running statistics that were never trained."""
    story = (
        Mark(f"{path}:5", "eval mode from here on; 4 BatchNorm layers use stale statistics"),
        Mark(f"{path}:10", "conv1.weight ‖w‖ 9.5937 → 5.4257e+13 in 5 steps (worst of 10 tasks)"),
    )
    findings = (
        Finding(
            "BN001",
            "eval-with-untrained-running-stats",
            Severity.ERROR,
            "features.norm1 normalises with running statistics 18.4 batch standard deviations from "
            "the batch's own",
            cause="stale-running-stats",
            layer="features.norm1",
            task=0,
            step=0,
            phase="support",
            count=10,
            unit="task",
            evidence={"mean_distance": 18.4, "batches_seen": 0},
            fix="net.train()",
            marks=story[:1],
            layers=tuple(f"features.norm{i}" for i in range(1, 5)),
        ),
        Finding(
            "NG001",
            "norm-explosion",
            Severity.ERROR,
            "features.conv1.weight grew 5.7e12 times in 5 steps",
            layer="features.conv1",
            task=3,
            step=2,
            phase="support",
            count=9,
            unit="task",
            evidence={"growth": 5.7e12, "last": math.inf},
            marks=story[1:],
        ),
        Finding(
            "NF001",
            "non-finite-weight",
            Severity.ERROR,
            "classifier.weight became nan at step 4",
            layer="classifier",
            task=3,
            step=4,
            phase="support",
            evidence={"norm": math.nan},
            marks=story[1:],
        ),
        Finding(
            "BN007",
            "transductive-batch-statistics",
            Severity.INFO,
            "statistics do not pass from task to task: higher clones the buffers",
            count=10,
            unit="task",
        ),
    )
    proof = ()
    if confidence == "confirmed":
        proof = (
            Intervention(
                "control", "nothing changed", "diverged", 5.4257e13, "features.conv1.weight", 3.1
            ),
            Intervention(
                "batch-statistics",
                "BatchNorm uses the batch's own",
                "stable",
                14.2,
                "features.conv2.weight",
                3.0,
            ),
            Intervention(
                "lr-tenth", "learning rate / 10", "diverged", math.inf, "classifier.weight", 3.0
            ),
            Intervention("float64", "double precision", "timed out", math.nan, None, 60.0),
        )
    return Diagnosis(
        verdict="diverged",
        summary=Summary(
            10,
            50,
            0,
            9,
            ("higher",),
            0.008,
            1,
            ("SGD",),
            (0.01, 0.01),
            ("Only rank 0 was recorded; start the probe on every rank to see the others.",),
        ),
        findings=findings,
        root_cause=RootCause(
            "stale-running-stats",
            confidence,  # type: ignore[arg-type]
            "Eval-mode BatchNorm normalises with running statistics that were never trained "
            "(mean 0, variance 1, 0 batches seen). higher gives each task its own copy of the "
            "buffers, so meta-training never reached the base model's.",
            "net.train()   # before the inner loop: batch statistics\n"
            "or nn.BatchNorm2d(..., track_running_stats=False), or recalibrate the statistics on "
            "the support set before adapting.",
            (0, 1),
            story,
        ),
        norms=norms(),
        batch_norm=batch_norm(),
        interventions=proof,
        recording=".probe/2026-11-23T09-14-eval",
    )


def healthy() -> Diagnosis:
    """A quiet run."""
    quiet = tuple(
        NormTrace(f"features.conv{i}.weight", 0, (9.59, 9.60, 9.61, 9.60 + i / 9))
        for i in range(1, 9)
    )
    return Diagnosis(
        "healthy",
        Summary(10, 50, 2, 9, ("higher",), 0.008, 1, ("SGD",), (0.01, 0.1)),
        norms=quiet,
        batch_norm=batch_norm("train", 0.1),
        health=Health(1.04, "features.conv1.weight", 0.35, 0.12, (1.61, 0.42)),
        recording=".probe/run 1",
    )


def unobserved() -> Diagnosis:
    """Nothing was seen."""
    return Diagnosis(
        "unobserved",
        Summary(incomplete=("A compiled region was not seen; run with TORCH_COMPILE_DISABLE=1.",)),
    )


def suspect(path: str = "train.py") -> Diagnosis:
    """An exception inside an inner loop, a warning, and no root cause."""
    return Diagnosis(
        "suspect",
        Summary(1, 3, 0, 4, ("functional_call",), 0.0),
        findings=(
            Finding(
                "LR002",
                "ineffective-inner-step",
                Severity.WARNING,
                "the largest relative update is 3e-7",
                layer="body.0",
                task=0,
                step=0,
                fix="raise the inner learning rate",
                marks=(Mark(f"{path}:3", "step"),),
            ),
            Finding("PT001", "unused-parameters", Severity.INFO, "head.bias gets no gradient"),
        ),
        exception=ExceptionReport(
            "RuntimeError",
            "One of the differentiated Tensors\nappears to not have been used",
            True,
            f"{path}:4",
        ),
        script_exit=1,
    )


def hostile() -> Diagnosis:
    """Everything a user can name is named to break a report."""
    long = "block." * 60 + HOSTILE
    mark = Mark(f"dir with, comma:{HOSTILE}.py:7", HOSTILE)
    finding = Finding(
        "XX001",
        HOSTILE,
        Severity.ERROR,
        f"line one\nline two\r\n::error::{HOSTILE}",
        cause="c",
        layer=long,
        task=0,
        step=1,
        phase="query",
        evidence={HOSTILE: HOSTILE, "v": -math.inf},
        fix=f"```\n{HOSTILE}",
        marks=(mark,),
        layers=(long, HOSTILE),
    )
    return Diagnosis(
        "diverged",
        Summary(1, 2, 0, 3, (HOSTILE,), 0.5, 2, (HOSTILE,), (1e-9, math.inf), (HOSTILE,)),
        findings=(finding, Finding(HOSTILE, HOSTILE, Severity.WARNING, HOSTILE)),
        root_cause=RootCause(
            HOSTILE, "inferred", HOSTILE, f"a\n\n  {HOSTILE}", (0, 99), (mark, mark)
        ),
        norms=(
            NormTrace(long, 0, (1.0, math.nan)),
            NormTrace("漢字." * 40, 1, ()),
            NormTrace(HOSTILE, 2, (math.inf,)),
        ),
        batch_norm=(
            BatchNormRow(
                long, {"support": HOSTILE, "query": "eval"}, None, math.nan, math.nan, "own"
            ),
            BatchNormRow("漢字" * 30, {}, 10**15, math.inf, 0.0, "cloned", 1),
        ),
        interventions=(Intervention(HOSTILE, HOSTILE, "diverged", math.nan, long),),
        exception=ExceptionReport(HOSTILE, HOSTILE * 9, True, HOSTILE),
        recording=HOSTILE,
        title=HOSTILE,
    )


ALL = {
    "diverged": diverged,
    "healthy": healthy,
    "unobserved": unobserved,
    "suspect": suspect,
    "hostile": hostile,
}
