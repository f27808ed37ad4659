"""Whether memory stays flat: the resident size of a watched process over very many inner steps.

``python benchmarks/memory.py`` prints the table, ``--write docs/memory.md`` writes it, ``--steps``
sets how many inner steps (100,000 unless told). Each loop runs in a process of its own, with the
full recording going to a temporary folder.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import multiprocessing.connection
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from overhead import by_hand, sinusoid, with_higher, with_torch_func

import divergence_probe

LOOPS: dict[str, Callable[..., None]] = {
    "by hand": by_hand,
    "higher": with_higher,
    "torch.func": with_torch_func,
}
STEPS_A_TASK = 5
SAMPLES = 5


def resident_mib() -> float:
    """Resident set size of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / 2**20


def sizes(name: str, steps: int, answer: multiprocessing.connection.Connection) -> None:
    """Send the resident size after each fifth of ``steps`` inner steps."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net, x, y = sinusoid()
    seen = []
    with divergence_probe.attach(net):
        LOOPS[name](net, x, y, 2000 // STEPS_A_TASK)  # buffers and caches reach their size
        for _ in range(SAMPLES):
            LOOPS[name](net, x, y, steps // STEPS_A_TASK // SAMPLES)
            gc.collect()
            seen.append(resident_mib())
    answer.send(seen)


def main() -> None:
    """Measure every loop and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    marks = [arguments.steps * (i + 1) // SAMPLES for i in range(SAMPLES)]
    lines = [
        "| 2x40 MLP | " + " | ".join(f"{mark:,} steps" for mark in marks) + " |",
        "| --- |" + " ---: |" * SAMPLES,
    ]
    spawn = multiprocessing.get_context("spawn")
    for name in LOOPS:
        receiver, sender = spawn.Pipe(duplex=False)
        process = spawn.Process(target=sizes, args=(name, arguments.steps, sender))
        process.start()
        seen = receiver.recv()
        process.join()
        lines.append(f"| {name} | " + " | ".join(f"{mib:.1f} MiB" for mib in seen) + " |")
        print(lines[-1], flush=True)
    if arguments.write:
        arguments.write.write_text(_page(lines), encoding="utf-8")


def _page(lines: list[str]) -> str:
    return (
        "# Memory\n\nMade by `python benchmarks/memory.py --write docs/memory.md`: resident "
        "size of a process with the probe attached, full recording, after so many inner steps. "
        f"torch {torch.__version__}, Python {platform.python_version()}.\n\n"
        + "\n".join(lines)
        + "\n"
    )


if __name__ == "__main__":
    main()
