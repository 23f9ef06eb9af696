"""Mutated and odd image files, arrays and idx files: each is read right, left out by name, or refused.

A good folder with one odd file must give the good images as they are, and of the odd one either what it shows or its
name among those that cannot be read.
"""

from __future__ import annotations

import gzip
import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from campaign import subjects
from campaign.harness import Box, Count, box, tried, scaled
from campaign.mutate import raw

CASES = 300
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")


def run(part: float, seed: int) -> Iterator[Count]:
    """Damaged files of every format, odd but right files, bombs, arrays, idx files."""
    subjects.trained()
    draw = random.Random(seed)
    share = scaled(CASES // 4, part)
    for kind, one in {
        "images: damaged files of 7 formats": damaged,
        "images: arrays, damaged or odd": arrays,
        "images: idx files, damaged": idx,
    }.items():
        yield many(kind, share, draw, one)
    yield many("images: bombs and files that are none", len(BOMBS), draw, bomb)
    failures = [f"{name}: {wrong}" for name, make in RIGHT.items() if (wrong := shown_right(make))]
    yield Count("images: odd modes, EXIF, 16 bit, CMYK, animations read right", len(RIGHT), failures)


def many(kind: str, cases: int, draw: random.Random, one: Callable[[random.Random, Box, int], list[str]]) -> Count:
    failures = []
    for number in range(cases):
        with box() as where:
            failures += [f"case {number}: {fault}" for fault in one(draw, where, number)]
    return Count(kind, cases, failures)


def picture(mode: str = "RGB", size: tuple[int, int] = (12, 8)) -> Image.Image:
    """A picture whose four corners differ."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 200, height))
    colour = np.stack([x, y, 255 - x], -1).round().astype(np.uint8)
    return Image.fromarray(colour).convert(mode)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    """A file's bytes."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def trained_on(data: str, where: Box, *more: str) -> list[str]:
    """Train one step on data; what is wrong with how that ended."""
    command = [*subjects.training(where.out, 1), "--data", data, *more]
    _, wrong = tried(command, where, seconds=120, correct=lambda: subjects.of_a_run(where.out))
    return wrong


def damaged(draw: random.Random, where: Box, number: int) -> list[str]:
    """Three good files and a damaged one."""
    form = FORMATS[number % len(FORMATS)]
    for i in range(3):
        (where.given / f"{i}.png").write_bytes(encoded(picture(), "PNG"))
    (where.given / f"odd.{form.lower()}").write_bytes(raw(draw, encoded(picture(), form)))
    strict = draw.choice(("0.01", "1"))
    return [f"{form}: {fault}" for fault in trained_on(f"folder:{where.given}:size=8", where, "--strict", strict)]


def arrays(draw: random.Random, where: Box, number: int) -> list[str]:
    """An array file with damage, or of a kind that is not images."""
    good = np.random.default_rng(number).integers(0, 256, (6, 8, 8), dtype=np.uint8)
    file = where.given / ("x.npy" if number % 2 else "x.npz")
    what = draw.randrange(5)
    odd = [
        good, good.astype(np.float64) / 255, good.astype(np.int64), good.astype(complex), good[:, :, :0], good[0], good[:0],
        np.full((4, 8, 8), np.nan), np.full((4, 8, 8), 1e300), np.array([{"a": 1}, None], dtype=object), good.astype("U3"),
        np.zeros((2, 3, 3, 3), np.uint8), np.zeros((2, 1, 1), np.uint8), np.float16(good / 255), good.view("S8"), np.zeros((2,) * 9),
    ]  # fmt: skip
    array = draw.choice(odd) if what == 0 else good
    if file.suffix == ".npy":
        np.save(file, array, allow_pickle=True)
    else:
        labels = draw.choice(
            (np.arange(6) % 2, np.arange(5), np.full(6, -1), np.full(6, 0.5), np.array(["a"] * 6), np.full(6, 2**40))
        )
        saver = draw.choice((np.savez, np.savez_compressed))
        saver(file, images=array, **({"labels": labels} if draw.random() < 0.5 else {}))
    if what > 1:
        file.write_bytes(raw(draw, file.read_bytes()))
    return trained_on(f"arrays:{file}", where)


def idx(draw: random.Random, where: Box, number: int) -> list[str]:
    """The MNIST family's files with damage in one."""
    images = np.random.default_rng(number).integers(0, 256, (6, 8, 8), dtype=np.uint8)
    contents = {
        "train-images-idx3-ubyte": struct.pack(">4B3I", 0, 0, 8, 3, 6, 8, 8) + images.tobytes(),
        "train-labels-idx1-ubyte": struct.pack(">4BI", 0, 0, 8, 1, 6) + bytes(range(6)),
    }
    for position, (name, content) in enumerate(contents.items()):
        packed = number % 2 == 0
        if position == draw.randrange(2) and draw.random() < 0.5:
            content = raw(draw, content)
        written = gzip.compress(content) if packed else content
        if draw.random() < 0.3:
            written = raw(draw, written)
        (where.given / (name + (".gz" if packed else ""))).write_bytes(written)
    return trained_on(f"idx:{where.given}", where)


def _huge_png(width: int, height: int) -> bytes:
    """A PNG of a few kB that says it has so many pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(2**22), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _text_bomb() -> bytes:
    """A PNG with a comment of 64 MiB in 64 kB."""
    whole = encoded(picture(), "PNG")
    data = b"Comment\0\0" + zlib.compress(bytes(2**26), 9)
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    return whole[:33] + chunk + whole[33:]


BOMBS: dict[str, bytes] = {
    "huge.png": _huge_png(50_000, 50_000), "wide.png": _huge_png(2**31 - 1, 1), "most.png": _huge_png(2**31 - 1, 2**31 - 1),
    "none.png": _huge_png(0, 0), "text.png": _text_bomb(), "empty.png": b"", "html.jpg": b"<html>", "zero.gif": bytes(1000),
    "eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(touch canary) run\n", "pickle.png": b"\x80\x04cos\nsystem\n.",
    "gif.gif": b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x02\x02L\x01\0;", "bmp.bmp": b"BM" + b"\xff" * 100,
    "tiff.tiff": b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 200, "ppm.ppm": b"P6 99999 99999 255\n", "npy.png": b"\x93NUMPY",
}  # fmt: skip


def bomb(draw: random.Random, where: Box, number: int) -> list[str]:
    """Three good files and one that is small and says it is large, or is no image."""
    name = list(BOMBS)[number]
    for i in range(3):
        (where.given / f"{i}.png").write_bytes(encoded(picture(), "PNG"))
    (where.given / name).write_bytes(BOMBS[name])
    return [f"{name}: {fault}" for fault in trained_on(f"folder:{where.given}:size=8", where, "--strict", "1")]


def _exif(orientation: int) -> Callable[[], tuple[bytes, str, np.ndarray]]:
    """A JPEG with an orientation, and what it shows."""

    def make() -> tuple[bytes, str, np.ndarray]:
        upright = picture(size=(16, 8))
        turns = Image.Transpose
        # what a camera stored, which the orientation turns back
        stored = {
            2: turns.FLIP_LEFT_RIGHT, 3: turns.ROTATE_180, 4: turns.FLIP_TOP_BOTTOM, 5: turns.TRANSPOSE,
            6: turns.ROTATE_90, 7: turns.TRANSVERSE, 8: turns.ROTATE_270,
        }  # fmt: skip
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = upright.transpose(stored[orientation]) if orientation in stored else upright
        return encoded(turned, "JPEG", exif=exif, quality=100, subsampling=0), "jpg", np.asarray(upright)

    return make


def _mode(mode: str, form: str) -> Callable[[], tuple[bytes, str, np.ndarray]]:
    def make() -> tuple[bytes, str, np.ndarray]:
        image = picture().convert(mode)
        return encoded(image, form), form.lower(), np.asarray(image.convert("L" if mode in ("1", "L", "LA") else "RGB"))

    return make


def _sixteen() -> tuple[bytes, str, np.ndarray]:
    grey = np.asarray(picture("L")).astype(np.uint16)
    return encoded(Image.fromarray(grey * 257), "PNG"), "png", grey.astype(np.uint8)


def _animated(form: str) -> Callable[[], tuple[bytes, str, np.ndarray]]:
    def make() -> tuple[bytes, str, np.ndarray]:
        first, second = picture("L").convert("RGB"), Image.new("RGB", (12, 8), "white")
        options = {} if form == "GIF" else {"lossless": True} if form == "WEBP" else {}
        return encoded(first, form, save_all=True, append_images=[second], **options), form.lower(), np.asarray(first)

    return make


def _transparent() -> tuple[bytes, str, np.ndarray]:
    layer = picture().convert("RGBA")
    layer.putalpha(Image.new("L", layer.size, 0))
    return encoded(layer, "PNG"), "png", np.full((8, 12, 3), 255, np.uint8)


RIGHT: dict[str, Callable[[], tuple[bytes, str, np.ndarray]]] = {
    **{f"EXIF orientation {n}": _exif(n) for n in (*range(0, 10), 255)},
    **{f"{mode} {form}": _mode(mode, form) for mode, form in (
        ("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("CMYK", "TIFF"), ("L", "TIFF"), ("P", "GIF"),
        ("RGB", "BMP"), ("RGB", "TIFF"), ("RGB", "PPM"),
    )},
    "16-bit grey": _sixteen,
    **{f"animated {form}": _animated(form) for form in ("GIF", "PNG", "WEBP", "TIFF")},
    "transparent": _transparent,
}  # fmt: skip


def shown_right(make: Callable[[], tuple[bytes, str, np.ndarray]]) -> str | None:
    """What is wrong with how a file is read, or None."""
    from dualout import data
    from dualout.errors import InputError

    content, suffix, expected = make()
    with box() as where:
        (where.given / f"x.{suffix}").write_bytes(content)
        try:
            found = data.load(f"folder:{where.given}")
        except InputError as error:
            return f"refused: {error}"
        image = np.asarray(found.gather(np.array([0]))[0])
    grey = expected.ndim == 2
    shown = image[0] if grey else image.transpose(1, 2, 0)
    if shown.shape != expected.shape:
        return f"has the shape {shown.shape}, not {expected.shape}"
    off = int(np.abs(shown.astype(int) - expected.astype(int)).max())
    return f"is {off} of 255 off" if off > 12 else None
