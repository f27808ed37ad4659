"""MAML on Omniglot with higher: a conv net learns to tell new characters apart from a few drawings.

Meta-trains on images_background_small1.zip and meta-tests on images_background_small2.zip, both
read as they are from https://github.com/brendenlake/omniglot (python/). Needs torch, higher, numpy
and pillow.

    python examples/omniglot_maml.py --data FOLDER_WITH_THE_ZIPS [--eval-mode eval]

Half a minute; for a quick look: --filters 12 --iterations 20 --outer-lr 0.005 --eval-tasks 6.
"""

from __future__ import annotations

import argparse
import io
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import higher
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

try:
    from PIL import Image
except ImportError:
    sys.exit("omniglot_maml: reading the drawings needs Pillow: pip install pillow")

META_TRAIN = "images_background_small1.zip"
META_TEST = "images_background_small2.zip"
SIZE = 28

Task = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def load_characters(archive: Path) -> torch.Tensor:
    """All drawings of a zip as a tensor [characters, drawings, 28, 28]: ink 1, paper 0."""
    characters: dict[str, list[np.ndarray]] = {}
    with zipfile.ZipFile(archive) as images:
        for name in sorted(images.namelist()):
            if name.endswith(".png"):
                drawing = Image.open(io.BytesIO(images.read(name))).convert("L")
                small = drawing.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
                characters.setdefault(name.rsplit("/", 1)[0], []).append(np.asarray(small))
    pixels = np.stack([np.stack(drawings) for drawings in characters.values()])
    return 1 - torch.from_numpy(pixels).float() / 255


def with_rotations(characters: torch.Tensor) -> torch.Tensor:
    """Each character turned by 90, 180 and 270 degrees is a new character (Santoro et al. 2016)."""
    return torch.cat([torch.rot90(characters, turns, dims=(2, 3)) for turns in range(4)])


def sample_task(characters: torch.Tensor, args: argparse.Namespace) -> Task:
    """Support and query images [n, 1, 28, 28] with labels [n] of `args.ways` random characters."""
    chosen = characters[torch.randperm(len(characters))[: args.ways]]
    drawings = torch.stack([character[torch.randperm(len(character))] for character in chosen])
    support = drawings[:, : args.shots].reshape(-1, 1, SIZE, SIZE)
    query = drawings[:, args.shots : args.shots + args.queries].reshape(-1, 1, SIZE, SIZE)
    labels = torch.arange(args.ways)
    return (
        support,
        labels.repeat_interleave(args.shots),
        query,
        labels.repeat_interleave(args.queries),
    )


class ConvNet(nn.Module):
    """The usual few-shot net: four times conv, batch norm, relu, pool, then a linear classifier."""

    def __init__(self, ways: int, filters: int) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for block in range(1, 5):
            layers[f"conv{block}"] = nn.Conv2d(1 if block == 1 else filters, filters, 3, padding=1)
            layers[f"norm{block}"] = nn.BatchNorm2d(filters)
            layers[f"relu{block}"] = nn.ReLU()
            layers[f"pool{block}"] = nn.MaxPool2d(2)
        self.features = nn.Sequential(layers)
        self.classifier = nn.Linear(filters, ways)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(self.features(images).flatten(1))
        return logits


def scale_convolutions(net: ConvNet, conv1_norm: float) -> None:
    """Scale all conv weights by one factor that gives conv1 the wanted norm.

    Batch statistics divide the scale out again, so nothing pulls it back and a long meta-training
    lets it grow; this starts from where such a run ends.
    """
    convolutions = [module for module in net.features if isinstance(module, nn.Conv2d)]
    factor = conv1_norm / convolutions[0].weight.norm().item()
    with torch.no_grad():
        for convolution in convolutions:
            convolution.weight *= factor


def meta_train(net: ConvNet, characters: torch.Tensor, args: argparse.Namespace) -> None:
    outer = torch.optim.Adam(net.parameters(), lr=args.outer_lr)
    inner = torch.optim.SGD(net.parameters(), lr=args.inner_lr)
    net.train()
    for iteration in range(1, args.iterations + 1):
        outer.zero_grad()
        losses, accuracies = [], []
        for _ in range(args.meta_batch):
            support, support_labels, query, query_labels = sample_task(characters, args)
            with higher.innerloop_ctx(
                net, inner, copy_initial_weights=False, track_higher_grads=True
            ) as (
                fnet,
                diffopt,
            ):
                for _ in range(args.inner_steps):
                    diffopt.step(F.cross_entropy(fnet(support), support_labels))
                logits = fnet(query)
                loss = F.cross_entropy(logits, query_labels)
                (loss / args.meta_batch).backward()
            losses.append(loss.item())
            accuracies.append((logits.argmax(1) == query_labels).float().mean().item())
        outer.step()
        if iteration % 10 == 0 or iteration == args.iterations:
            loss, accuracy = np.mean(losses), np.mean(accuracies)
            print(f"iteration {iteration}: train_loss={loss:.4f} train_acc={accuracy:.4f}")


def meta_test(net: ConvNet, characters: torch.Tensor, args: argparse.Namespace) -> None:
    inner = torch.optim.SGD(net.parameters(), lr=args.inner_lr)
    if args.eval_mode == "eval":
        net.eval()
    else:
        net.train()
    losses, accuracies = [], []
    for task in range(args.eval_tasks):
        support, support_labels, query, query_labels = sample_task(characters, args)
        with higher.innerloop_ctx(net, inner, track_higher_grads=False) as (fnet, diffopt):
            print(
                f">task {task} (before inner adapt): "
                f"conv1.weight.norm={fnet.features.conv1.weight.norm():.6g}"
            )
            for _ in range(args.inner_steps):
                diffopt.step(F.cross_entropy(fnet(support), support_labels))
            print(
                f">task {task} (after inner adapt):  "
                f"conv1.weight.norm={fnet.features.conv1.weight.norm():.6g}"
            )
            with torch.no_grad():
                logits = fnet(query)
        losses.append(F.cross_entropy(logits, query_labels).item())
        accuracies.append((logits.argmax(1) == query_labels).float().mean().item())
    print(f"eval_loss={np.mean(losses)}, eval_acc={np.mean(accuracies)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="MAML on Omniglot with higher.")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the two zips")
    parser.add_argument(
        "--eval-mode",
        choices=["train", "eval"],
        default="train",
        help="mode of the net at meta-test",
    )
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--inner-steps", type=int, default=5)
    parser.add_argument("--inner-lr", type=float, default=0.2)
    parser.add_argument("--outer-lr", type=float, default=0.003)
    parser.add_argument("--meta-batch", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--eval-tasks", type=int, default=10)
    parser.add_argument("--filters", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--conv1-norm", type=float, default=9.5937, help="norm of conv1 at the start; 0: not scaled"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    for name in (META_TRAIN, META_TEST):
        if not (args.data / name).is_file():
            sys.exit(
                f"omniglot_maml: no {name} in {args.data}, "
                "get it from https://github.com/brendenlake/omniglot"
            )
    torch.set_num_threads(1)  # the net is too small to gain from more
    torch.manual_seed(args.seed)
    net = ConvNet(args.ways, args.filters)
    if args.conv1_norm:
        scale_convolutions(net, args.conv1_norm)
    meta_train(net, with_rotations(load_characters(args.data / META_TRAIN)), args)
    meta_test(net, load_characters(args.data / META_TEST), args)


if __name__ == "__main__":
    main()
