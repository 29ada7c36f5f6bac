"""What does the loss gain? Digits with a long tail: cross-entropy, focal loss, LDAM and LMF on equal terms.

``python -m benchmarks.quickstart`` trains the same small network with each loss, from the same weights and on the same
batches, prints accuracy, macro-F1 and the time of the loss, and writes ``benchmarks/results/<device>/quickstart.csv``
and ``quickstart.png``. The losses have the paper's options; nothing was tuned for this data.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import measure
from benchmarks.problems import long_tailed_counts
from lmf_triton import FocalLoss, LDAMLoss, LMFLoss, ldam_margins
from reference import lmf as reference

N_CLASSES = 10
LARGEST_CLASS = 100  # of the 174 to 183 images a class: at a ratio of 100, the rarest class has exactly one
SPLIT_SEED = 0
BATCH_SIZE = 32  # the paper's
LEARNING_RATE = 1e-3  # Adam's default
HIDDEN = 128
TIMING_SECONDS = 4.0
COLORS = ("#BBBBBB", "#56B4E9", "#E69F00", "#0072B2")  # after Okabe and Ito: the colour-blind tell them apart too

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Split:
    """Images ``(N, 64)`` in [0, 1] and their labels ``(N,)``."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Score:
    """How one trained network does on the test set."""

    loss: str
    seed: int
    accuracy: float
    class_f1: tuple[float, ...]

    @property
    def macro_f1(self) -> float:
        return float(np.mean(self.class_f1))


def make_losses(class_counts: Tensor) -> dict[str, nn.Module]:
    """The four losses, all from this package."""
    return {
        "cross-entropy": FocalLoss(gamma=0),
        "focal": FocalLoss(),
        "LDAM": LDAMLoss(class_counts),
        "LMF": LMFLoss(class_counts),
    }


def make_eager_losses(class_counts: Tensor) -> dict[str, Loss]:
    """The same losses as one would write them in PyTorch."""
    margins = ldam_margins(class_counts)
    return {
        "cross-entropy": F.cross_entropy,
        "focal": partial(reference.lmf_loss, alpha=0),
        "LDAM": partial(reference.lmf_loss, margins=margins, beta=0),
        "LMF": partial(reference.lmf_loss, margins=margins),
    }


def split_digits(class_counts: Tensor, seed: int, device: torch.device) -> Split:
    """A long-tailed training set, drawn by the seed from the first 100 images of each class; the others are the test.

    The test set does not depend on the seed.
    """
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    draw = np.random.default_rng(seed)
    chosen, held_out = [], []
    for label, count in enumerate(class_counts.tolist()):
        of_class = order[labels[order] == label]
        chosen.extend(draw.choice(of_class[:LARGEST_CLASS], count, replace=False))
        held_out.extend(of_class[LARGEST_CLASS:])
    images = torch.tensor(images / 16, dtype=torch.float32, device=device)
    labels = torch.tensor(labels, device=device)
    return Split(images[chosen], labels[chosen], images[held_out], labels[held_out])


def train(split: Split, loss: Loss, seed: int, epochs: int) -> nn.Module:
    """A small network trained with this loss; weights and batches depend on the seed alone."""
    device = split.train_images.device
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, N_CLASSES)).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    for _ in range(epochs):
        for batch in torch.randperm(len(split.train_labels)).to(device).split(BATCH_SIZE):
            optimizer.zero_grad()
            loss(network(split.train_images[batch]), split.train_labels[batch]).backward()
            optimizer.step()
    return network


@torch.no_grad()
def evaluate(network: nn.Module, split: Split, loss_name: str, seed: int) -> Score:
    """Scores on the test set."""
    predicted, labels = network(split.test_images).argmax(1).cpu(), split.test_labels.cpu()
    class_f1 = f1_score(labels, predicted, average=None, labels=range(N_CLASSES), zero_division=0)
    return Score(loss_name, seed, accuracy_score(labels, predicted), tuple(class_f1.tolist()))


def time_losses(losses: dict[str, Loss], eager: dict[str, Loss], class_counts: Tensor) -> dict[str, dict[str, float]]:
    """Median microseconds of forward + backward of each loss alone, on one training batch: ours and eager PyTorch."""
    device = class_counts.device
    logits = torch.randn(BATCH_SIZE, N_CLASSES, device=device, requires_grad=True)
    target = torch.multinomial(class_counts.float(), BATCH_SIZE, replacement=True)

    def step(loss: Loss) -> None:
        torch.autograd.grad(loss(logits, target), logits)

    calls = {f"{name}, ours": partial(step, loss) for name, loss in losses.items()}
    calls |= {f"{name}, eager": partial(step, loss) for name, loss in eager.items()}
    times = measure.host_times(calls, device, TIMING_SECONDS)
    return {name: {kind: 1e6 * times[f"{name}, {kind}"] for kind in ("ours", "eager")} for name in losses}


def mean_and_deviation(values: Sequence[float]) -> str:
    """Mean ± standard deviation over the seeds, in percent; of one seed, its value."""
    mean = f"{100 * np.mean(values):.1f}"
    return f"{mean} ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else mean


def format_scores(scores: Sequence[Score], times: dict[str, dict[str, float]]) -> str:
    """One line a loss."""
    header = ("loss", "accuracy %", "macro-F1 %", "loss µs/step", "eager µs/step", "eager / ours")
    lines = []
    for name, time in times.items():
        of_loss = [score for score in scores if score.loss == name]
        lines.append(
            (
                name,
                mean_and_deviation([score.accuracy for score in of_loss]),
                mean_and_deviation([score.macro_f1 for score in of_loss]),
                f"{time['ours']:.0f}",
                f"{time['eager']:.0f}",
                f"{time['eager'] / time['ours']:.2f}",
            )
        )
    return measure.format_table(header, lines)


def plot(scores: Sequence[Score], class_counts: Sequence[int], path: Path) -> None:
    """F1 of each class for the four losses, from the most frequent class to the rarest."""
    figure = Figure(figsize=(10, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(score.loss for score in scores))
    width = 0.8 / len(names)
    for i, (name, color) in enumerate(zip(names, COLORS, strict=True)):
        of_loss = [score for score in scores if score.loss == name]
        f1 = np.array([score.class_f1 for score in of_loss])
        axes.bar(
            np.arange(N_CLASSES) + (i - (len(names) - 1) / 2) * width,
            f1.mean(0),
            width,
            yerr=f1.std(0, ddof=1) if len(f1) > 1 else None,
            color=color,
            error_kw={"elinewidth": 0.8, "ecolor": "#333333"},
            label=f"{name} (macro-F1 {mean_and_deviation([score.macro_f1 for score in of_loss])} %)",
        )
    axes.set_xticks(range(N_CLASSES), [f"{label}\n{count}" for label, count in enumerate(class_counts)])
    axes.set_xlabel("digit, and its number of training images")
    axes.set_ylabel("F1 on the test set")
    axes.set_ylim(0, 1.02)
    axes.set_xlim(-0.6, N_CLASSES - 0.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.grid(True, color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    n_seeds = len({score.seed for score in scores})
    ratio = max(class_counts) // min(class_counts)
    axes.set_title(f"Digits with a {ratio}:1 tail: mean and standard deviation over {n_seeds} seeds", pad=50)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def result_rows(scores: Sequence[Score], times: dict[str, dict[str, float]]) -> list[dict[str, object]]:
    """One line for each trained network."""
    return [
        {
            "loss": score.loss,
            "seed": score.seed,
            "accuracy": f"{score.accuracy:.4f}",
            "macro_f1": f"{score.macro_f1:.4f}",
            **{f"f1_{label}": f"{f1:.4f}" for label, f1 in enumerate(score.class_f1)},
            "loss_us": f"{times[score.loss]['ours']:.1f}",
            "eager_us": f"{times[score.loss]['eager']:.1f}",
        }
        for score in scores
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--output", type=Path, help="folder (default: benchmarks/results/<device>)")
    args = parser.parse_args()

    torch.set_num_threads(1)  # more do not make so small a network faster, and stall on a busy machine
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    environment = measure.environment(device)
    class_counts = long_tailed_counts(N_CLASSES, LARGEST_CLASS).to(device)
    n_test = len(split_digits(class_counts, 0, device).test_labels)
    print(f"training images of the digits 0 to 9: {class_counts.tolist()}; test images: {n_test}")

    losses, scores = make_losses(class_counts), []
    with tqdm(total=args.seeds * len(losses), unit="training") as progress:
        for seed in range(args.seeds):
            split = split_digits(class_counts, seed, device)
            for name, loss in losses.items():
                scores.append(evaluate(train(split, loss, seed, args.epochs), split, name, seed))
                progress.update()
    times = time_losses(losses, make_eager_losses(class_counts), class_counts)

    output = args.output or measure.results_folder(device)
    measure.write_csv(output / "quickstart.csv", result_rows(scores, times), environment)
    plot(scores, class_counts.tolist(), output / "quickstart.png")
    print(format_scores(scores, times))
    print(f"\n{environment}\n{output / 'quickstart.csv'}\n{output / 'quickstart.png'}")


if __name__ == "__main__":
    main()
