"""Exceptions out of inner loops: explained, found, and told apart from the script's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from divergence_probe.rules.raised_explanations import explain

from .command_line import probe, strict_json, write_script

LABELS = """
net = torch.nn.Linear(4, 3)
inner = torch.optim.SGD(net.parameters(), lr=0.1)
for task in range(2):
    x, y = torch.randn(6, 4), torch.arange(6) % 3 + task
    with higher.innerloop_ctx(net, inner) as (fast, steps):
        for _ in range(3):
            steps.step(torch.nn.functional.cross_entropy(fast(x), y))
"""
OWN = """
for task, step in loop(0.01):
    pass
{}
"""


def failed_run(folder: Path, body: str) -> tuple[dict[str, Any], str]:
    write_script(folder, body)
    ended = probe(folder, "run", "-o", "rec", "--json", "r.json", "train.py")
    assert ended.returncode == 1
    return strict_json(folder / "r.json"), ended.stderr


def test_a_label_outside_the_logits_is_explained_under_the_traceback(tmp_path: Path) -> None:
    report, stderr = failed_run(tmp_path, LABELS)
    assert report["exception"]["inner_loop"] is True
    assert report["verdict"] == "suspect"
    assert report["root_cause"]["cause"] == "raised-in-inner-loop"
    (finding,) = [f for f in report["findings"] if f["rule"] == "EX001"]
    assert (finding["task"], finding["step"]) == (1, 0)
    assert stderr.index("IndexError: Target") < stderr.index("was raised inside an inner loop")
    assert "return_inverse=True" in stderr


@pytest.mark.parametrize("body", ['open("/nowhere/at/all")', "torch.ones(2, 3) @ torch.ones(2)"])
def test_an_exception_after_the_loops_is_the_scripts_own(tmp_path: Path, body: str) -> None:
    report, stderr = failed_run(tmp_path, OWN.format(body))
    assert report["exception"]["inner_loop"] is False
    assert (report["verdict"], report["findings"]) == ("healthy", [])
    assert "inner loop" not in stderr.partition("HEALTHY")[0]


def test_what_the_script_raises_itself_in_its_step_loop_names_no_cause(tmp_path: Path) -> None:
    body = """
    net = torch.nn.Linear(2, 1)
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    for task in range(2):
        with higher.innerloop_ctx(net, inner) as (fast, steps):
            for step in range(3):
                steps.step(fast(torch.randn(4, 2)).pow(2).mean())
                if task == 1 and step == 2:
                    raise RuntimeError("enough")
    """
    report, _ = failed_run(tmp_path, body)
    assert report["exception"]["inner_loop"] is True
    assert report["root_cause"] is None
    assert [f["rule"] for f in report["findings"] if f["severity"] == "error"] == ["EX001"]


@pytest.mark.parametrize(
    ("message", "module", "word"),
    [
        ("Expected more than 1 value per channel when training, got input", "", "GroupNorm"),
        ("During a grad (vjp, jvp, grad, etc) transform, the function provided attempted to call "
         "in-place operation (aten::add_.Tensor)", "BatchNorm2d", "track_running_stats=False"),
        ("Trying to backward through the graph a second time", "", "inside the loop"),
        ("derivative for aten::_scaled_dot_product_flash_attention_for_cpu_backward is not "
         "implemented", "", "sdpa_kernel"),
        ("One of the differentiated Tensors appears to not have been used in the graph", "",
         "allow_unused=True"),
        ("The differentiated Tensor at index 1 appears to not have been used in the graph.", "",
         "allow_unused=True"),
        ("Optimizer type <class 'torch.optim.adamw.AdamW'> not supported by higher yet.", "",
         "register_optim"),
        ("Cannot create a consistent method resolution\norder (MRO) for bases Module, ABC", "",
         "net.module"),
    ],
)  # fmt: skip
def test_known_messages_have_a_fix(message: str, module: str, word: str) -> None:
    known = explain(message, module)
    assert known is not None and word in known.fix


def test_an_unknown_message_has_none() -> None:
    assert explain("mat1 and mat2 shapes cannot be multiplied") is None
