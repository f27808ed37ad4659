"""Several processes under watch: real gloo process groups, one recording, one report."""

from __future__ import annotations

import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch.distributed

import divergence_probe
from divergence_probe.ranks import Place, place

from .command_line import command, environment, probe, strict_json

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="no gloo backend in this build of torch",
)

TRAIN = """
    import sys, torch, torch.distributed as dist
    from torch import nn
    from torch.nn import functional as F

    dist.init_process_group("gloo")
    rank, fault = dist.get_rank(), sys.argv[1]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
    outer = torch.optim.SGD(net.parameters(), lr=0.05)
    torch.manual_seed(10 + rank)                        # every rank has its own tasks
    for k in range(5):
        outer.zero_grad()
        for task in range(2):
            x = torch.randn(16, 3) + rank
            y = x @ torch.randn(3, 1)
            fast = dict(net.named_parameters())
            buffers = {n: b.clone() for n, b in net.named_buffers()}
            for step in range(3):
                out = torch.func.functional_call(net, (fast, buffers), (x,))
                grads = torch.autograd.grad(F.mse_loss(out, y), fast.values(), create_graph=True)
                rate = 0.02 if fault == "rate" and rank else 0.05
                fast = {n: w - rate * g for (n, w), g in zip(fast.items(), grads)}
            out = torch.func.functional_call(net, (fast, buffers), (x,))
            (F.mse_loss(out, y) / 2).backward()
        for p in net.parameters():
            average = p.grad.clone()
            dist.all_reduce(average)
            if not (fault == "skip" and rank and k >= 2):
                p.grad.copy_(average / 2)
        outer.step()
        net(x)                                          # statistics follow this rank's tasks
        for buffer in net.buffers():
            if fault != "buffers":
                dist.broadcast(buffer, src=0)
        if fault == "raise" and rank:
            raise RuntimeError("this rank is lost")
    dist.destroy_process_group()
"""


def two_ranks(folder: Path, *arguments: str) -> list[subprocess.CompletedProcess[str]]:
    """``probe run`` as rank 0 and as rank 1, at once."""
    (folder / "train.py").write_text(textwrap.dedent(TRAIN), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    running = [
        subprocess.Popen(
            command("run", *arguments),
            cwd=folder,
            env=environment(**common, RANK=str(rank), OMP_NUM_THREADS="1"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [one.communicate(timeout=120) for one in running]
    return [
        subprocess.CompletedProcess(one.args, one.returncode, *output)
        for one, output in zip(running, outputs, strict=True)
    ]


def test_a_rank_that_steps_with_its_own_gradient(tmp_path: Path) -> None:
    zero, one = two_ranks(
        tmp_path, "-o", "rec", "--json", "r.json", "--fail-on", "warning", "train.py", "skip"
    )

    assert (zero.returncode, one.returncode) == (1, 0), zero.stderr + one.stderr
    assert one.stderr == "" and "2 ranks" in zero.stderr
    report = strict_json(tmp_path / "r.json")
    assert (report["verdict"], report["summary"]["ranks"]) == ("suspect", 2)
    assert report["root_cause"]["cause"] == "rank-divergence"
    finding = report["findings"][report["root_cause"]["findings"][0]]
    assert (finding["rank"], finding["layer"]) == (1, "0")
    assert (finding["evidence"]["outer_step"], finding["evidence"]["ranks"]) == (3.0, "1")
    again = probe(tmp_path, "report", "rec", "--report", "concise")
    assert "RANK001" in again.stdout and "not averaged over the ranks" in again.stdout
    steps = divergence_probe.load(tmp_path / "rec").steps()
    assert set(steps["rank"]) == {0, 1}


def test_other_tasks_on_each_rank_are_healthy(tmp_path: Path) -> None:
    arguments = ("-o", "rec", "--json", "r.json", "--report", "concise")
    zero, one = two_ranks(tmp_path, *arguments, "train.py", "none")

    assert (zero.returncode, one.returncode) == (0, 0), zero.stderr + one.stderr
    report = strict_json(tmp_path / "r.json")
    assert report["verdict"] == "healthy"
    assert not [f for f in report["findings"] if f["rule"] == "RANK001"]

    refused = two_ranks(tmp_path, "-o", "rec", "train.py", "none")
    assert [run.returncode for run in refused] == [2, 2]
    assert all("already holds a recording" in run.stderr for run in refused)


def test_statistics_that_are_not_broadcast_are_a_remark(tmp_path: Path) -> None:
    rank_7 = tmp_path / "rec" / "rank-7"
    rank_7.mkdir(parents=True)
    (rank_7.parent / "meta.json").write_text('{"schema_version": 1}', encoding="utf-8")
    arguments = ("-o", "rec", "--force", "--json", "r.json")
    ran = two_ranks(tmp_path, *arguments, "train.py", "buffers")

    report = strict_json(tmp_path / "r.json")
    assert report["verdict"] == "healthy", ran[0].stderr
    (remark,) = [f for f in report["findings"] if f["rule"] == "RANK001"]
    assert (remark["severity"], remark["layer"]) == ("info", "1")
    assert not rank_7.exists()


def test_a_rank_that_fails_says_so_itself(tmp_path: Path) -> None:
    zero, one = two_ranks(tmp_path, "-o", "rec", "train.py", "raise")

    assert one.returncode == 1
    assert "this rank is lost" in one.stderr and "divergence_probe" not in one.stderr
    assert zero.returncode != 0  # gloo tells it that its peer is gone
    assert "2 ranks" in probe(tmp_path, "report", "rec").stdout


def test_torchrun_and_the_folder_ranks_agree_on(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(textwrap.dedent(TRAIN), encoding="utf-8")
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    ended = subprocess.run(
        [sys.executable, "-m", *launcher, "divergence_probe", "run", "train.py", "rate"],
        cwd=tmp_path,
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=180,
    )

    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("SUSPECT") == 1 and "2 ranks" in ended.stderr
    assert "learning rate is 0.02 on rank 1 and 0.05 on rank 0" in " ".join(ended.stderr.split())
    (folder,) = (tmp_path / ".probe").glob("train-ranks-*")
    assert divergence_probe.load(folder).ranks == [0, 1]


SPAWNING = """
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing

import divergence_probe


def work(rank, port):
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    weight = torch.randn(3, 1, requires_grad=True)
    with divergence_probe.attach(output="rec"):
        for _ in range(8):
            fast = weight
            for _ in range(3 + rank):
                loss = ((torch.ones(2, 3) @ fast - 1) ** 2).mean()
                fast = fast - 0.1 * torch.autograd.grad(loss, fast, create_graph=True)[0]
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, (int(sys.argv[1]),), nprocs=2)
"""


def test_spawned_workers_that_attach(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SPAWNING, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ended = subprocess.run(
        [sys.executable, "train.py", str(port)],
        cwd=tmp_path,
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ended.returncode == 0, ended.stderr

    diagnosis = divergence_probe.diagnose(tmp_path / "rec")

    assert diagnosis.root_cause is not None
    assert "took 4 inner steps a task and rank 0 3, from the start" in diagnosis.root_cause.summary


@pytest.mark.parametrize(
    ("rank", "world", "expected"),
    [
        (None, None, (0, 1)),
        ("1", "2", (1, 2)),
        ("1", None, (0, 1)),
        ("2", "2", (0, 1)),
        ("x", "2", (0, 1)),
        ("0", "1", (0, 1)),
    ],
)
def test_the_place_among_ranks(
    monkeypatch: pytest.MonkeyPatch,
    rank: str | None,
    world: str | None,
    expected: tuple[int, int],
) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", world)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)

    assert (place().rank, place().world) == expected


def test_ranks_of_several_machines_need_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from divergence_probe.errors import RecordingError
    from divergence_probe.recording_folder import prepare

    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecordingError, match="several machines: name the folder"):
        prepare(None, "train", place=Place(0, 4, local_world=2))
    assert prepare(Path("rec"), "train", place=Place(3, 4, local_world=2)) == tmp_path / "rec"
