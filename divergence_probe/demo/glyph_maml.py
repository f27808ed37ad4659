"""MAML with higher on made-up glyphs: a net learns to tell new glyphs apart from a few drawings.

A glyph class is a few random strokes; a drawing of it is those strokes with their control points
jittered. Needs torch and higher, nothing to download.

    python -m divergence_probe.demo.glyph_maml [--eval-mode eval]
"""

from __future__ import annotations

import argparse
from collections import OrderedDict

import higher
import torch
from torch import nn
from torch.nn import functional as F

SIZE = 20
STROKES = 3
Task = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def draw(strokes: torch.Tensor) -> torch.Tensor:
    """Rasterise strokes [n, strokes, 3 control points, 2] in [0, 1]^2 to [n, 1, SIZE, SIZE]."""
    time = torch.linspace(0, 1, 12).view(-1, 1)
    start, bend, end = (point.unsqueeze(-2) for point in strokes.unbind(-2))
    curve = ((1 - time) ** 2 * start + 2 * time * (1 - time) * bend + time**2 * end).flatten(1, 2)
    axis = (torch.arange(SIZE) + 0.5) / SIZE
    vertical, horizontal = (-(((curve.unsqueeze(-1) - axis) / 0.035) ** 2)).exp().unbind(-2)
    ink = torch.einsum("npy,npx->npyx", vertical, horizontal).amax(1)
    return ink.unsqueeze(1)


def sample_task(glyphs: torch.Tensor, args: argparse.Namespace) -> Task:
    """Support and query images [n, 1, SIZE, SIZE] with labels [n] of `args.ways` random glyphs."""
    chosen = glyphs[torch.randperm(len(glyphs))[: args.ways]]

    def drawings(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        strokes = chosen.repeat_interleave(count, dim=0)
        shift = 0.03 * torch.randn(len(strokes), 1, 1, 2)
        jittered = strokes + shift + 0.03 * torch.randn_like(strokes)
        return draw(jittered), torch.arange(args.ways).repeat_interleave(count)

    return *drawings(args.shots), *drawings(args.queries)


class GlyphNet(nn.Module):
    """Four times conv, batch norm, relu, pool, then a linear classifier."""

    def __init__(self, ways: int, filters: int) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for block in range(1, 5):
            conv = nn.Conv2d(1 if block == 1 else filters, filters, 3, padding=1)
            # As large as a long meta-training makes them: batch statistics divide the scale out.
            nn.init.normal_(conv.weight, std=0.5)
            layers[f"conv{block}"] = conv
            layers[f"norm{block}"] = nn.BatchNorm2d(filters)
            layers[f"relu{block}"] = nn.ReLU()
            layers[f"pool{block}"] = nn.MaxPool2d(2)
        self.features = nn.Sequential(layers)
        self.classifier = nn.Linear(filters, ways)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(self.features(images).flatten(1))
        return logits


def meta_train(net: GlyphNet, glyphs: torch.Tensor, args: argparse.Namespace) -> None:
    outer = torch.optim.Adam(net.parameters(), lr=args.outer_lr)
    inner = torch.optim.SGD(net.parameters(), lr=args.inner_lr)
    net.train()
    for iteration in range(1, args.iterations + 1):
        outer.zero_grad()
        total_loss = total_accuracy = 0.0
        for _ in range(args.meta_batch):
            support, support_labels, query, query_labels = sample_task(glyphs, args)
            with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fnet, diffopt):
                for _ in range(args.inner_steps):
                    diffopt.step(F.cross_entropy(fnet(support), support_labels))
                logits = fnet(query)
                loss = F.cross_entropy(logits, query_labels) / args.meta_batch
                loss.backward()
            total_loss += loss.item()
            total_accuracy += (
                logits.argmax(1) == query_labels
            ).float().mean().item() / args.meta_batch
        outer.step()
        if iteration % 5 == 0 or iteration == args.iterations:
            print(
                f"iteration {iteration}: train_loss={total_loss:.4f} train_acc={total_accuracy:.4f}"
            )


def meta_test(net: GlyphNet, glyphs: torch.Tensor, args: argparse.Namespace) -> None:
    inner = torch.optim.SGD(net.parameters(), lr=args.inner_lr)
    if args.eval_mode == "eval":
        net.eval()
    else:
        net.train()
    total_loss = total_accuracy = 0.0
    for task in range(args.eval_tasks):
        support, support_labels, query, query_labels = sample_task(glyphs, args)
        with higher.innerloop_ctx(net, inner, track_higher_grads=False) as (fnet, diffopt):
            before = fnet.features.conv1.weight.norm().item()
            for _ in range(args.inner_steps):
                diffopt.step(F.cross_entropy(fnet(support), support_labels))
            after = fnet.features.conv1.weight.norm().item()
            with torch.no_grad():
                logits = fnet(query)
        print(f"task {task}: conv1 norm before adapting {before:.6g}, after {after:.6g}")
        total_loss += F.cross_entropy(logits, query_labels).item() / args.eval_tasks
        total_accuracy += (logits.argmax(1) == query_labels).float().mean().item() / args.eval_tasks
    print(f"eval_loss={total_loss:.4f}, eval_acc={total_accuracy:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="MAML with higher on made-up glyphs.")
    parser.add_argument(
        "--eval-mode",
        choices=["train", "eval"],
        default="train",
        help="mode of the net at meta-test",
    )
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--queries", type=int, default=5)
    parser.add_argument("--inner-steps", type=int, default=5)
    parser.add_argument("--inner-lr", type=float, default=0.2)
    parser.add_argument("--outer-lr", type=float, default=0.005)
    parser.add_argument("--meta-batch", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=15)
    parser.add_argument("--eval-tasks", type=int, default=8)
    parser.add_argument("--filters", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the net is too small to gain from more
    torch.manual_seed(args.seed)
    glyphs = torch.rand(200, STROKES, 3, 2) * 0.8 + 0.1
    net = GlyphNet(args.ways, args.filters)
    meta_train(net, glyphs[:150], args)
    meta_test(net, glyphs[150:], args)


if __name__ == "__main__":
    main()
