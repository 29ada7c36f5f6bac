"""Files of images: which are taken, how one is read, and what is said of those that cannot be."""

import hashlib
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from benchmarks.accuracy import progress
from benchmarks.accuracy.dataset import MalformedData, listed

READING = 2  # how pixels are made of a file. Another number where that changes: kept features are of one way of reading
# What Pillow reads wherever it is installed, so that a folder is the same data set everywhere.
IMAGE_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
# What systems and programs leave in a folder, besides what begins with a dot.
JUNK = frozenset(("__macosx", "$recycle.bin", "@eadir", "desktop.ini", "lost+found", "thumbs.db"))

ORIENTATION = 0x0112  # of EXIF: how a camera was held
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
ALPHA_MODES = ("LA", "PA", "RGBA")
WHITE = (255, 255, 255, 255)  # what a page shows behind an image: black ink on nothing would vanish on black

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
PEEK = 132  # bytes, as far as DICOM's mark


def is_junk(path: Path) -> bool:
    """Whether a file or folder is no person's: hidden, such as a Mac's ``._x.jpg``, or left by a program."""
    return path.name.startswith(".") or path.name.casefold() in JUNK


def is_image(path: Path) -> bool:
    """Whether a file is an image by its suffix."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def open_image(path: Path, mode: str) -> Image.Image:
    """The image of a file in mode "L" or "RGB": upright as EXIF says, transparency on white; of several the first.

    Raises:
        MalformedData: it cannot be read. The message names the file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's name no file; what keeps an image from being read is an error
            return _open(path, mode)
    except Exception as error:  # Pillow raises a dozen kinds
        raise MalformedData(f"{path}: {_reason(path, error)}") from error


def _open(path: Path, mode: str) -> Image.Image:
    with Image.open(path) as image:
        if image.mode.startswith(("I", "F")):
            raise MalformedData(f"more than 8 bits a channel (mode {image.mode}), which would be clipped")
        image.load()
        return _upright(_opaque(image), _orientation(image)).convert(mode)


def _opaque(image: Image.Image) -> Image.Image:
    """Transparency composed, whichever way the file has it; the image itself where it has none."""
    if image.mode in PREMULTIPLIED:
        image = image.convert(PREMULTIPLIED[image.mode])
    if image.mode not in ALPHA_MODES and "transparency" not in image.info:
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, WHITE), layer).convert("RGB")


def _orientation(image: Image.Image) -> int:
    """What EXIF says, after loading: Pillow has turned a TIFF by then, and says so."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # EXIF that is damaged turns nothing
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def fault_of_file(path: Path) -> str | None:
    """What keeps a file from being read as far as the system knows, which reads nothing of it."""
    try:
        if path.is_dir():
            return "a folder, not a file"
        if not path.exists():
            return "a link to what is not there" if path.is_symlink() else "not there"
        if not path.is_file():
            return "no ordinary file"
        if not os.access(path, os.R_OK):
            return "no permission to read it"
        return None if path.stat().st_size else "empty, 0 bytes"
    except OSError as error:
        return error.strerror or str(error)


def _reason(path: Path, error: Exception) -> str:
    """Why an image could not be read, in words."""
    if fault := fault_of_file(path):
        return fault
    if isinstance(error, MalformedData):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):
        return f"too large: above Pillow's limit of {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
    if isinstance(error, UnidentifiedImageError):
        return _content(path)
    if isinstance(error, OSError) and error.strerror:  # the system's, not Pillow's
        return error.strerror
    return f"cut off or damaged: {error or type(error).__name__}"


def _content(path: Path) -> str:
    """What a file is that Pillow does not know."""
    with path.open("rb") as file:
        start = file.read(PEEK)
    if start.startswith(LFS_POINTER):
        return "the place of an image that Git LFS has not fetched (git lfs pull)"
    if start[4:8] == b"ftyp":
        return "HEIC, AVIF or a video, which Pillow does not read: save it as JPEG or PNG"
    if start[128:] == b"DICM":
        return "DICOM, which Pillow does not read: save it as PNG"
    if start.isascii() and b"\0" not in start:
        return "text, not an image"
    return "cut off, damaged, or no image that Pillow knows"


def damage(reasons: Sequence[str], n_images: int) -> MalformedData:
    """The one error for all images that cannot be read, each a line with its path and why."""
    return MalformedData(
        f"{len(reasons):,} of {n_images:,} images cannot be read. Mend them, or take them out of the folder:\n"
        f"{listed(reasons)}"
    )


def check(paths: Sequence[Path]) -> None:
    """Decode all these images.

    Raises:
        MalformedData: some cannot be read. The message lists all of them.
    """
    reasons = []
    for path in progress.bar(paths, "images"):
        if fault := fault_of_file(path):  # opening a pipe would wait for ever
            reasons.append(f"{path}: {fault}")
            continue
        try:
            open_image(path, "RGB")
        except MalformedData as error:
            reasons.append(str(error))
    if reasons:
        raise damage(reasons, len(paths))


def identical(paths: Sequence[Path]) -> list[list[int]]:
    """Which of these files have the same bytes: sets of two or more, by index. Reads those of equal size only."""
    by_size: dict[int, list[int]] = {}
    for i, path in enumerate(paths):
        by_size.setdefault(path.stat().st_size, []).append(i)
    candidates = [i for same in by_size.values() if len(same) > 1 for i in same]
    by_content: dict[bytes, list[int]] = {}
    for i in progress.bar(sorted(candidates), "copies of images"):
        with suppress(OSError):  # which is said of it, and of all others, when all are read
            by_content.setdefault(hashlib.sha256(paths[i].read_bytes()).digest(), []).append(i)
    return [same for same in by_content.values() if len(same) > 1]
