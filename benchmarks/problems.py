"""The named problems that every benchmark measures, with long-tailed class counts and targets."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

IMBALANCE_RATIO = 100  # largest over smallest class, as in the long-tailed CIFAR of Cao et al. 2019
RAREST_COUNT = 10
SEED = 0


@dataclass(frozen=True)
class Batch:
    """Logits (a leaf that requires a gradient) with their targets, and the training counts of the classes."""

    logits: Tensor
    target: Tensor
    class_counts: Tensor


@dataclass(frozen=True)
class Problem:
    """A shape of logits that people train with, and ``why`` it is measured."""

    name: str
    shape: tuple[int, ...]  # (N, C) or (N, C, d1, ..., dk)
    why: str
    dtype: torch.dtype = torch.float32
    target_dtype: torch.dtype = torch.int64  # of a floating-point one the target holds class probabilities
    launch_bound: bool = False  # so small that on a GPU the host's work is what costs

    @property
    def target_shape(self) -> tuple[int, ...]:
        return self.shape if self.target_dtype.is_floating_point else self.shape[:1] + self.shape[2:]

    def make(self, device: torch.device) -> Batch:
        """The same tensors in every run on this kind of device."""
        generator = torch.Generator(device).manual_seed(SEED)
        n_classes = self.shape[1]
        sample_shape = self.shape[:1] + self.shape[2:]
        class_counts = long_tailed_counts(n_classes, RAREST_COUNT * IMBALANCE_RATIO).to(device)
        target = torch.multinomial(
            class_counts.float(), math.prod(sample_shape), replacement=True, generator=generator
        ).view(sample_shape)
        logits = torch.randn(self.shape, dtype=self.dtype, device=device, generator=generator, requires_grad=True)
        if self.target_dtype.is_floating_point:
            target = mixed_up(target, n_classes, self.target_dtype, generator)
        return Batch(logits, target.to(self.target_dtype), class_counts)


def mixed_up(target: Tensor, n_classes: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Class probabilities as mixup makes them: each sample's class and the previous sample's share it, ``(N, C, ...)``.

    A tenth is spread over all classes, as by label smoothing, so that none has nothing to be computed for.
    """
    shape = (*target.shape[:1], n_classes, *target.shape[1:])
    probabilities = torch.full(shape, 0.1 / n_classes, dtype=dtype, device=target.device)
    share = 0.9 * torch.rand((), dtype=dtype, device=target.device, generator=generator)
    for classes, part in (target, share), (target.roll(1, 0), 0.9 - share):
        probabilities.scatter_add_(1, classes.unsqueeze(1), part.expand(classes.unsqueeze(1).shape))
    return probabilities


def long_tailed_counts(n_classes: int, largest: int, ratio: float = IMBALANCE_RATIO) -> Tensor:
    """Class counts that decay exponentially from ``largest`` to ``largest / ratio``, ``(C,)`` int64, at least 1."""
    return (largest * ratio ** -torch.linspace(0, 1, n_classes, dtype=torch.float64)).round().long().clamp_min(1)


TINY = Problem("tiny", (32, 7), "paper's batches", launch_bound=True)

CPU_PROBLEMS = (
    TINY,
    Problem("short", (65536, 8), "rows"),
    Problem("imagenet", (4096, 1000), "classification"),
    Problem("vocabulary", (256, 32000), "tokens"),
    Problem("dense", (4, 19, 128, 128), "segmentation"),
    Problem("soft_short", (65536, 8), "rows with mixup", target_dtype=torch.float32),
    Problem("soft_imagenet", (4096, 1000), "classification with mixup", target_dtype=torch.float32),
)


def _large(n_classes: int, dtype: torch.dtype) -> Problem:
    n = min(max(2**28 // n_classes, 4096), 65536)  # from beyond an H100's L2 cache of 50 MiB to 4 GiB
    name = f"large_{n_classes // 1024}k_{'bf16' if dtype == torch.bfloat16 else 'fp32'}"
    return Problem(name, (n, n_classes), "bandwidth", dtype)


GPU_PROBLEMS = (
    TINY,
    *(_large(k * 1024, dtype) for dtype in (torch.bfloat16, torch.float32) for k in (1, 4, 16, 32, 64, 128, 256)),
    Problem("few_256k_bf16", (8, 256 * 1024), "few rows", torch.bfloat16),
    Problem("odd_50k_bf16", (8192, 50257), "GPT-2's vocabulary: rows at odd addresses", torch.bfloat16),
    *(Problem(f"short_{n_classes}", (2**22, n_classes), "rows") for n_classes in (7, 8, 32, 256)),
    Problem("dense_2", (8, 2, 512, 1024), "masks", target_dtype=torch.uint8),
    Problem("dense_8", (8, 8, 512, 1024), "organs"),
    Problem("dense_19", (8, 19, 512, 1024), "Cityscapes"),
    Problem("dense_150", (8, 150, 512, 512), "ADE20K"),
    Problem("soft_8", (2**22, 8), "rows with mixup", target_dtype=torch.float32),
    Problem("soft_1k_bf16", (65536, 1000), "classification with mixup", torch.bfloat16, torch.float32),
    Problem("soft_32k_bf16", (8192, 32 * 1024), "distillation", torch.bfloat16, torch.bfloat16),
    Problem("soft_128k_bf16", (4096, 128 * 1024), "distillation of long rows", torch.bfloat16, torch.bfloat16),
    Problem("soft_dense_19", (8, 19, 512, 1024), "segmentation with soft masks", target_dtype=torch.float32),
)

PROBLEMS = {problem.name: problem for problem in (*CPU_PROBLEMS, *GPU_PROBLEMS)}
