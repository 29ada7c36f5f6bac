"""Promise: an image is read as it is meant to be seen; all that cannot be read are named before anything is trained."""

import io
import os
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin
from test_accuracy_data import RED, write_image, write_sheet
from test_accuracy_protocol import CPU, make_dataset, record, small_frozen_model

from benchmarks.accuracy import __main__ as experiment
from benchmarks.accuracy import command, fingerprint, images, models
from benchmarks.accuracy.data import MalformedData, load
from benchmarks.accuracy.images import open_image

GREEN_PIXEL, WHITE = (30, 200, 30), (255, 255, 255)


def colours(height: int = 12, width: int = 8, channels: int = 3) -> np.ndarray:
    """A picture that no turn leaves as it is, of blocks that a JPEG keeps apart."""
    return (
        np.random.default_rng(0)
        .integers(0, 256, (height // 4, width // 4, channels), np.uint8)
        .repeat(4, 0)
        .repeat(4, 1)
    )


def run(data: Path, output: Path, *options: str) -> None:
    """The command, as far as its data: nothing is trained."""
    line = ["accuracy", "--dataset", "folder", "--model", "cnn", "--data", str(data), "--output", str(output)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*line, "--seeds", "1", "--epochs", "1", "--losses", "lmf", *options])
        record(patch, experiment, "train_all", lambda args, _: None)
        command.run(experiment.main)


# -------------------------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_exif_says(orientation, suffix, tmp_path):
    path, exif = tmp_path / f"a.{suffix}", Image.Exif()
    exif[images.ORIENTATION] = orientation
    Image.fromarray(colours()).save(path, exif=exif)
    turned = open_image(path, "RGB")
    assert turned.size == ((8, 12) if orientation < 5 else (12, 8))
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(turned), np.asarray(ImageOps.exif_transpose(image)))
    if suffix == "png":  # loses nothing
        assert np.array_equal(np.asarray(turned), colours()) == (orientation == 1)


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\x05damaged", b"Exif\0\0nonsense"])
def test_damaged_exif_turns_nothing(exif, tmp_path):
    Image.fromarray(colours()).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg", "RGB").size == (8, 12)


@pytest.mark.parametrize("orientation", [0, 9, 1000])
def test_an_orientation_that_there_is_not_turns_nothing(orientation, tmp_path):
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    Image.fromarray(colours()).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png", "RGB")), colours())


# ------------------------------------------------------------------------------------------------------- transparency


def with_alpha(mode: str) -> Image.Image:
    """One row: a pixel of colour, the same at half, and one that cannot be seen, in each way that Pillow has."""
    image = Image.fromarray(np.array([[(*GREEN_PIXEL, 255), (*GREEN_PIXEL, 128), (0, 0, 0, 0)]], np.uint8))
    return image.convert(mode)


@pytest.mark.parametrize(("mode", "suffix"), [("RGBA", "png"), ("RGBA", "webp"), ("RGBA", "tif"), ("LA", "png")])
def test_what_is_transparent_is_white(mode, suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    with_alpha(mode).save(path, **({"lossless": True} if suffix == "webp" else {}))
    first, half, nothing = np.asarray(open_image(path, "RGB")).astype(int)[0]
    solid = np.asarray(with_alpha(mode).convert("RGB"))[0, 0].astype(int)
    assert (first == solid).all() and (nothing == WHITE).all()
    np.testing.assert_allclose(half, solid * (128 / 255) + 255 * (127 / 255), atol=1)
    assert open_image(path, "L").mode == "L" and open_image(path, "L").getpixel((2, 0)) == 255


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1"])
@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_a_colour_that_stands_for_nothing_is_white(mode, suffix, tmp_path):
    """Of a palette, by its number or by an alpha of each colour, or one shade of a PNG without alpha."""
    image = Image.new(mode, (2, 1))
    image.putpixel((1, 0), (0, 9, 0) if mode == "RGB" else 1)
    if mode == "P":
        image.putpalette([0, 0, 0, 0, 9, 0])
    image.save(tmp_path / f"a.{suffix}", transparency=(0, 0, 0) if mode == "RGB" and suffix == "png" else 0)
    read = open_image(tmp_path / f"a.{suffix}", "RGB")
    if suffix == "png" or mode != "RGB":  # GIF finds a palette of its own for colours
        assert read.getpixel((0, 0)) == WHITE != read.getpixel((1, 0)) or mode == "1"


def test_a_palette_with_an_alpha_for_each_colour(tmp_path):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 10, 20, 30, 10, 20, 30])
    image.putdata([0, 1, 2])
    image.save(tmp_path / "a.png", transparency=bytes((255, 0, 51)))
    assert np.asarray(open_image(tmp_path / "a.png", "RGB"))[0].tolist() == [[10, 20, 30], [255] * 3, [206, 208, 210]]


def test_alpha_that_hides_nothing_changes_nothing(tmp_path):
    pixels = colours()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])).save(tmp_path / "b.png")
    assert np.array_equal(np.asarray(open_image(tmp_path / "b.png", "RGB")), pixels)
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png", "RGB")), pixels)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_an_image_without_alpha_is_what_pillow_makes_of_it(mode, tmp_path):
    path = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png")
    Image.fromarray(colours()).convert(mode).save(path)
    for wanted in ("RGB", "L"):
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(open_image(path, wanted)), np.asarray(image.convert(wanted)))


def test_an_image_is_turned_and_composed_at_once(tmp_path):
    pixels, exif = colours(channels=4), Image.Exif()
    exif[images.ORIENTATION] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    white = Image.new("RGBA", (8, 12), WHITE)
    expected = Image.alpha_composite(white, Image.fromarray(pixels)).convert("RGB").rotate(-90, expand=True)
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png", "RGB")), np.asarray(expected))


# ------------------------------------------------------------------------------------------------------------- damage


def jpeg(size: int = 64) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)).save(file, "jpeg")
    return file.getvalue()


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(file, "png")
    return file.getvalue()


DAMAGED_BY_CONTENT = {
    "cut off.jpg": (jpeg()[:1500], "cut off or damaged"),
    "cut off.png": (png()[:1500], "cut off or damaged"),
    "cut off early.jpg": (jpeg()[:10], "cut off"),
    "wrong inside.png": (png()[:100] + bytes(100) + png()[200:], "damaged"),
    "no image.jpg": (bytes(range(256)) * 4, "no image that Pillow knows"),
    "text.jpg": (b"<html>404 Not Found</html>", "text, not an image"),
    "pointer.jpg": (images.LFS_POINTER + b"v1\noid sha256:4d7a\nsize 1\n", "git lfs pull"),
    "telephone.jpg": (b"\0\0\0\x18ftypheic" + bytes(100), "HEIC"),
    "radiograph.jpg": (bytes(128) + b"DICM" + bytes(100), "DICOM"),
}


def write_damaged(folder: Path) -> dict[str, str]:
    """A file of each kind whose damage its content shows, and what is to be said of it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (content, _) in DAMAGED_BY_CONTENT.items():
        (folder / name).write_bytes(content)
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(folder / "16 bits.png")
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(folder / "float.tif")
    deep = dict.fromkeys(("16 bits.png", "float.tif"), "more than 8 bits a channel")
    return {name: reason for name, (_, reason) in DAMAGED_BY_CONTENT.items()} | deep


def write_faulty(folder: Path) -> dict[str, str]:
    """Of each kind that the system knows of without reading."""
    (folder / "folder.jpg").mkdir(parents=True)
    write_image(folder / "folder.jpg" / "a.jpg", RED)
    (folder / "empty.png").touch()
    (folder / "gone.jpg").symlink_to(folder / "elsewhere.jpg")
    (folder / "itself.jpg").symlink_to(folder / "itself.jpg")
    os.mkfifo(folder / "pipe.jpg")
    link = "a link to what is not there"
    reasons = {"folder.jpg": "a folder", "empty.png": "empty, 0 bytes", "gone.jpg": link, "itself.jpg": link}
    return reasons | {"pipe.jpg": "no ordinary file"}


def write_sound(data: Path, n_images: int = 12) -> None:
    """Two classes whose images differ."""
    for i in range(n_images):
        write_image(data / "ab"[i % 2] / f"{i}.png", (i, 2 * i, 100))


def assert_lists(message: str, folder: Path, expected: dict[str, str], n_images: int) -> None:
    first, *lines = message.strip().splitlines()
    assert first.startswith(f"{len(expected)} of {n_images} images cannot be read.")
    assert len(lines) == len(expected)
    for name, reason in expected.items():
        (line,) = [line for line in lines if f"{folder / name}: " in line]
        assert reason in line


@pytest.mark.parametrize("kinds", ["content", "files", "both"])
def test_all_damaged_images_are_listed_in_one_error(kinds, tmp_path, capsys):
    data, output = tmp_path / "data", tmp_path / "output"
    write_sound(data)
    expected = (write_damaged(data / "a") if kinds != "files" else {}) | (
        write_faulty(data / "a") if kinds != "content" else {}
    )
    with pytest.raises(SystemExit, match="2"):
        run(data, output)
    message = capsys.readouterr().err
    assert_lists(message[message.index(f"{len(expected)} of") :], data / "a", expected, 12 + len(expected))
    assert not output.exists()


def test_an_image_above_pillows_limit_is_listed(tmp_path, monkeypatch):
    write_sound(tmp_path)
    write_image(tmp_path / "a" / "large.png", RED)  # 16x12
    for image in tmp_path.rglob("[0-9]*.png"):
        Image.new("RGB", (2, 2), (int(image.stem), 0, 0)).save(image)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)  # an error from twice that, a warning that names no file before
    assert open_image(tmp_path / "a" / "large.png", "RGB").size == (16, 12)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 90)
    with pytest.raises(MalformedData) as error:
        models.read_images(models.MODELS["cnn"], load("folder", tmp_path))
    assert_lists(str(error.value), tmp_path / "a", {"large.png": "above Pillow's limit of 180 pixels"}, 13)


@pytest.mark.parametrize("fault", ["system", "reading", "hash"])
def test_an_image_that_may_not_be_read_is_listed(fault, tmp_path, monkeypatch):
    """By what the system says beforehand, or only on opening, as on a network drive."""
    write_sound(tmp_path)
    access, read_bytes, open_file = os.access, Path.read_bytes, Image.open

    def denied(path, *args):
        raise PermissionError(13, "Permission denied", str(path))

    dataset = load("folder", tmp_path)
    if fault == "system":
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "3.png" and access(path, mode))
        with pytest.raises(MalformedData) as error:
            load("folder", tmp_path)
        assert_lists(str(error.value), tmp_path / "b", {"3.png": "no permission"}, 12)
        return
    monkeypatch.setattr(Image, "open", lambda path: denied(path) if path.name == "3.png" else open_file(path))
    if fault == "reading":
        with pytest.raises(MalformedData) as error:
            models.read_images(models.MODELS["cnn"], dataset)
    else:
        monkeypatch.setattr(Path, "read_bytes", lambda path: denied(path) if path.name == "3.png" else read_bytes(path))
        dataset = load("folder", tmp_path)
        with pytest.raises(MalformedData) as error:
            fingerprint.of_images(dataset)
    assert_lists(str(error.value), tmp_path / "b", {"3.png": "Permission denied"}, 12)


def test_a_long_list_is_cut(tmp_path):
    write_sound(tmp_path)
    for i in range(70):
        (tmp_path / "a" / f"x{i:02}.jpg").write_bytes(b"text %d" % i)
    with pytest.raises(MalformedData) as error:
        models.read_images(models.MODELS["cnn"], load("folder", tmp_path))
    lines = str(error.value).splitlines()
    assert lines[0].startswith("70 of 82 images") and len(lines) == 52 and lines[-1].strip() == "and 20 more"


def test_damaged_images_of_a_published_data_set_are_listed_too(tmp_path):
    rows = [(f"HAM_{i}", f"ISIC_{i}", ("nv", "mel")[i % 2]) for i in range(6)]
    write_sheet(tmp_path / "HAM10000_metadata.csv", ("lesion_id", "image_id", "dx"), *rows)
    for i in range(6):
        write_image(tmp_path / "HAM10000_images_part_1" / f"ISIC_{i}.jpg", (i, 0, 0))
    folder = tmp_path / "HAM10000_images_part_1"
    (folder / "ISIC_2.jpg").write_bytes(jpeg()[:1500])
    (folder / "ISIC_4.jpg").write_bytes(b"")
    with pytest.raises(MalformedData) as error:
        models.read_images(models.MODELS["cnn"], load("ham10000", tmp_path))
    assert_lists(str(error.value), folder, {"ISIC_2.jpg": "cut off", "ISIC_4.jpg": "empty, 0 bytes"}, 6)


# ------------------------------------------------------------------------------------------------- memory and features


def test_reading_images_takes_the_memory_of_the_tensor_once(tmp_path):
    dataset, model = make_dataset((40, 30, 30)), replace(models.MODELS["cnn"], image_size=200)
    tracemalloc.start()
    try:
        inputs = models.read_images(model, dataset)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    size = inputs.numel()
    assert size == 100 * 200 * 200
    assert size <= kept and peak < 1.1 * size
    for i in (0, 57, 99):
        assert np.array_equal(inputs[i].numpy(), models.read_image(model, dataset, i))


def test_grey_images_before_and_after_coloured_ones(tmp_path):
    grey = make_dataset((6, 4))
    model = replace(models.MODELS["cnn"], image_mode="RGB", image_size=8)
    for coloured in ({0}, {5}, {9}, {2, 7}, set(range(10))):
        mixed = replace(
            grey,
            read=lambda i, coloured=coloured: (
                grey.read(i).convert("RGB").point(lambda v: v // 2) if i in coloured else grey.read(i)
            ),
        )
        stack = models.read_images(model, mixed).numpy()
        assert stack.shape == (10, 3, 8, 8)
        for i in range(10):
            assert np.array_equal(stack[i], np.broadcast_to(models.read_image(model, mixed, i), (3, 8, 8)))


def test_features_are_written_into_one_tensor(monkeypatch):
    """The features of all batches, the last of which is smaller, without a second copy of them all."""
    dataset, model = make_dataset((60, 40, 30)), small_frozen_model()
    inputs = models.read_images(model, dataset)
    encoder = model.make_encoder(None)
    monkeypatch.setattr(torch, "cat", None)
    encoded = models.encode(model, encoder, inputs)
    with torch.no_grad():
        for start in (0, 64, 128):
            assert torch.equal(encoded[start : start + 64], encoder(inputs[start : start + 64]))
    assert encoded.is_contiguous() and encoded.shape == (130, 5)


def test_features_of_another_way_of_reading_are_not_used(monkeypatch, tmp_path):
    computed = record(monkeypatch, models, "encode", lambda args, features: features)
    dataset, model = make_dataset((6, 4, 3)), small_frozen_model()
    for reading, n_computed in ((images.READING, 1), (images.READING, 1), (images.READING + 1, 2), (images.READING, 2)):
        monkeypatch.setattr(images, "READING", reading)
        models.load_inputs(model, dataset, tmp_path, None, CPU)
        assert len(computed) == n_computed


def test_an_animated_image_is_its_first(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN_PIXEL)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "a.tif", "RGB").getpixel((0, 0)) == RED


def test_text_in_a_png_is_no_obstacle(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 1000, zip=True)
    Image.fromarray(colours()).save(tmp_path / "a.png", pnginfo=info)
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png", "RGB")), colours())
