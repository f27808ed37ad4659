"""What watching costs: paired runs, bare and watched in turn, in one process.

``python benchmarks/overhead.py`` prints the table; ``--write docs/overhead.md`` writes it;
``--pairs N`` sets how many pairs (default 25), ``--device cuda`` runs the loops on a GPU (by the
clock, not the processor's time, and without the floors). Each figure is the median of the paired
ratios, with the quartiles; the recording is complete and goes to a temporary folder. The floors are
what the least a watcher could do costs in the same loops: nothing of ours finds anything out in
them (see ``floors.py``).
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import higher
import torch
import torch.nn.functional as F
from floors import (
    PassingOn,
    Watch,
    alone,
    copies_only,
    in_full,
    norms_only,
    tailored_by_hand,
    tailored_to_higher,
    tailored_to_torch_func,
)
from torch import Tensor, nn

import divergence_probe

Loop = Callable[[nn.Module, Tensor, Tensor, int], None]


def sinusoid() -> tuple[nn.Module, Tensor, Tensor]:
    """The usual regression net: two hidden layers of 40 units, 10 samples."""
    net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    x = torch.linspace(-5, 5, 10).unsqueeze(1)
    return net, x, torch.sin(x)


def convolutional(filters: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The usual few-shot net: four blocks of convolution, BatchNorm, ReLU and pooling."""
    blocks: list[nn.Module] = []
    for i in range(4):
        blocks += [
            nn.Conv2d(1 if i == 0 else filters, filters, 3, padding=1),
            nn.BatchNorm2d(filters),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    net = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(filters, 5))
    return net, torch.randn(25, 1, 28, 28), torch.arange(5).repeat(5)


def with_higher(net: nn.Module, x: Tensor, y: Tensor, tasks: int) -> None:
    """MAML with higher, SGD, five second-order inner steps a task."""
    loss_of = F.cross_entropy if y.dtype is torch.long else F.mse_loss
    inner = torch.optim.SGD(net.parameters(), lr=0.01)
    outer = torch.optim.Adam(net.parameters(), lr=1e-4)
    for _ in range(tasks):
        outer.zero_grad()
        with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fast, optimizer):
            for _ in range(5):
                optimizer.step(loss_of(fast(x), y))
            loss_of(fast(x), y).backward()
        outer.step()


def by_hand(net: nn.Module, x: Tensor, y: Tensor, tasks: int) -> None:
    """MAML by hand: a list of fast weights and ``torch.autograd.grad``."""
    outer = torch.optim.Adam(net.parameters(), lr=1e-4)
    for _ in range(tasks):
        outer.zero_grad()
        fast = list(net.parameters())
        for _ in range(5):
            grads = torch.autograd.grad(F.mse_loss(_mlp(fast, x), y), fast, create_graph=True)
            fast = [w - 0.01 * g for w, g in zip(fast, grads, strict=True)]
        F.mse_loss(_mlp(fast, x), y).backward()
        outer.step()


def with_torch_func(net: nn.Module, x: Tensor, y: Tensor, tasks: int) -> None:
    """MAML with ``torch.func.grad`` on a dictionary of parameters."""
    outer = torch.optim.Adam(net.parameters(), lr=1e-4)

    def loss_of(parameters: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(_mlp(list(parameters.values()), x), y)

    gradient = torch.func.grad(loss_of)
    for _ in range(tasks):
        outer.zero_grad()
        fast = dict(net.named_parameters())
        for _ in range(5):
            grads = gradient(fast)
            fast = {name: fast[name] - 0.01 * grads[name] for name in fast}
        loss_of(fast).backward()
        outer.step()


def _mlp(w: list[Tensor], x: Tensor) -> Tensor:
    h = F.relu(F.linear(x, w[0], w[1]))
    return F.linear(F.relu(F.linear(h, w[2], w[3])), w[4], w[5])


#: name, loop, model, tasks a run, and the ratio we mean to stay below
CASES = (
    ("2x40 MLP, higher", with_higher, sinusoid, 120, 1.12),
    ("2x40 MLP, by hand", by_hand, sinusoid, 120, 1.20),
    ("2x40 MLP, torch.func", with_torch_func, sinusoid, 120, 1.20),
    ("4-conv/8, higher, second order", with_higher, lambda: convolutional(8), 18, 1.04),
    ("4-conv/64, higher, second order", with_higher, lambda: convolutional(64), 6, 1.01),
)

#: A run there is to last long enough, too, for its end (what is measured, written and judged then).
_TASKS_ON_GPU = 40

_WRITTEN_FOR_IT = "a recorder written for that loop"
_IN_FULL = "the same, measured, written and judged by the probe"

#: the case it is about, what it does, and the least a watcher could do there
FLOORS: tuple[tuple[str, str, Watch], ...] = (
    ("2x40 MLP, higher", "keep references, norms of 32 steps at once", norms_only),
    ("2x40 MLP, higher", _WRITTEN_FOR_IT, alone(tailored_to_higher)),
    ("2x40 MLP, higher", _IN_FULL, in_full(tailored_to_higher)),
    ("2x40 MLP, by hand", "copies of steps, norms of 32 at once", copies_only),
    ("2x40 MLP, by hand", "an empty function mode", lambda net: PassingOn()),
    ("2x40 MLP, by hand", _WRITTEN_FOR_IT, alone(tailored_by_hand)),
    ("2x40 MLP, by hand", _IN_FULL, in_full(tailored_by_hand)),
    ("2x40 MLP, torch.func", "an empty function mode", lambda net: PassingOn()),
    ("2x40 MLP, torch.func", _WRITTEN_FOR_IT, alone(tailored_to_torch_func)),
    ("2x40 MLP, torch.func", _IN_FULL, in_full(tailored_to_torch_func)),
    ("4-conv/8, higher, second order", _WRITTEN_FOR_IT, alone(tailored_to_higher)),
    ("4-conv/64, higher, second order", _WRITTEN_FOR_IT, alone(tailored_to_higher)),
)


def measure(
    loop: Loop,
    make: Callable[[], tuple[nn.Module, Tensor, Tensor]],
    tasks: int,
    pairs: int,
    watch: Watch = divergence_probe.attach,
    device: str = "cpu",
) -> list[float]:
    """Ratios watched / bare of ``pairs`` runs, the two of a pair one after the other."""
    torch.manual_seed(0)
    net, x, y = (part.to(device) for part in make())
    ratios = []
    for pair in range(pairs + 2):
        first, second = (False, True) if pair % 2 else (True, False)
        times = {
            watched: _time(loop, net, x, y, tasks, watch(net) if watched else nullcontext())
            for watched in (first, second)
        }
        if pair >= 2:  # the first two warm up
            ratios.append(times[True] / times[False])
    return ratios


def _time(
    loop: Loop,
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    tasks: int,
    context: AbstractContextManager[object],
) -> float:
    gc.collect()
    with context as watched:
        loop(net, x, y, 6)  # what is paid once, and learning a loop, is not the cost of a step
        _settle(watched)
        started = _clock(x)
        loop(net, x, y, tasks)
        _settle(watched)
        return _clock(x) - started


def _clock(x: Tensor) -> float:
    """Seconds of this process, which others disturb less; of a GPU, of the clock, at rest."""
    if not x.is_cuda:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _settle(watched: object) -> None:
    """Measure, write and judge what the probe still keeps, so that it counts where it was kept."""
    if isinstance(watched, divergence_probe.Probe):
        _ = watched.recording


def main() -> None:
    """Measure every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=25)
    parser.add_argument("--only", default="")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    on_cpu = arguments.device == "cpu"
    lines = [
        "| loop | watched / bare, median | quartiles | aim |",
        "| --- | ---: | ---: | ---: |",
    ]
    cases = {case[0]: case for case in CASES}
    rows = [(case[0], case, f"{case[4]:.2f}", divergence_probe.attach) for case in CASES]
    if on_cpu:
        rows += [(f"floor, {name}: {what}", cases[name], "", w) for name, what, w in FLOORS]
    for name, (_, loop, make, tasks, _), goal, watch in rows:
        if arguments.only not in name:
            continue
        tasks = tasks if on_cpu else max(tasks, _TASKS_ON_GPU)
        ratios = measure(loop, make, tasks, arguments.pairs, watch, arguments.device)
        low, middle, high = statistics.quantiles(ratios, n=4)
        lines.append(f"| {name} | {middle:.3f} | {low:.3f} to {high:.3f} | {goal} |")
        print(lines[-1], flush=True)
    if arguments.write:
        page = _page(lines, arguments)
        arguments.write.write_text(page, encoding="utf-8")


def _page(lines: list[str], arguments: argparse.Namespace) -> str:
    on_cpu = arguments.device == "cpu"
    title, options = ("Overhead", "") if on_cpu else ("Overhead on a GPU", "--device cuda ")
    machine = platform.machine() if on_cpu else torch.cuda.get_device_name()
    return (
        f"# {title}\n\nMade by `python benchmarks/overhead.py {options}--write "
        f"docs/{arguments.write.name}`: {arguments.pairs} pairs of runs, bare and watched in turn, "
        "in one process and one thread, full recording; what is measured, written and judged at "
        f"the end of a run is counted in. torch {torch.__version__}, "
        f"Python {platform.python_version()}, {machine}.\n\n"
        + "\n".join(lines)
        + ("\n\n" + _WHERE_IT_GOES if on_cpu else "\n")
    )


_WHERE_IT_GOES = """\
Quartiles are of the pairs; other programs on the same machine widen them.

## What the floors are

An *empty function mode* sees every operation and does nothing with it: the least a watcher costs
that follows operations all the time. The *copies* (with `higher`, references) are the least a
recorder costs that knows where to look: it keeps each inner step's weights and gradients and takes
their norms many steps at a time. The *recorder written for that loop* takes what a recording holds:
weights, gradients, losses and lines of every step, the last update (by a function mode, for no
later gradient shows it), running statistics around every BatchNorm call, the query, the outer step,
and all their numbers. It is told everything else: that there is a loop and which, how its updates
are made, where tasks begin and end, what the parameters are called. It tells no restart, no other
model and no fault from a step, writes nothing and judges nothing. *Measured, written and judged by
the probe*, what it noted becomes the very recording that the probe makes itself: only finding out
is left out. See `benchmarks/floors.py`.

## Where the rest goes

Timed between the statements, in the loop itself, a 2x40 net by hand costs 2.3 milliseconds more a
task of 6.5: 0.3 for copies of weights and gradients, 0.35 for their numbers, 0.2 for the function
mode around the last update. The other 1.4 are what finds out about the loop, names, writes and
judges: some hundred statements of 0.1 to 10 microseconds, no single one worth more than a
hundredth of the run. They run in between torch's, with cold caches, several times slower than in a
tight loop. Calls that only pass through what is patched, with the probe switched off, cost 1.00 to
1.02. Compiled with mypyc, 23 modules of that path ran no faster: of the samples a profiler took,
the interpreter's own fell by a quarter, and as many came up in calls of its C interface.

What it would take was tried: once a loop had gone the same way for some rounds, each gradient was
asked only whether it could be the next one, and all that there is to say of a round was said many
rounds later, in one go with warm caches. That gave 0.05 by hand and with torch.func, for six
hundred lines that are a second way through all the observer knows; it was left out.

Shares also depend on what else the machine does: series on other days gave 1.33 to 1.59 by hand,
1.23 to 1.36 with `higher` and 1.24 to 1.46 with torch.func.

With 8 filters the probe's own work is 4.4 milliseconds of 105 a task: 1.7 for the statistics of
four layers before and after 24 calls (11 microseconds a copy, which takes 1 in a tight loop), 0.6
for copies of weights and gradients, 0.6 for their numbers, 0.6 for the outer step. Runs in a
process of their own gave 1.032 and 1.039. With 64 filters, on a machine that takes 950 milliseconds
a task, it is 15: numbers of 112,000 weights 5, copies of them 3, statistics 3. The rest is not
work: how many fresh pages the run takes from the system for its activations differs from run to
run, bare or watched (17,000 to 50,000 page faults a task). What is kept is copied to pages of the
probe's own, so as not to add to them.
"""


if __name__ == "__main__":
    main()
