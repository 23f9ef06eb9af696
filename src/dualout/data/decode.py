"""One image file -> uint8 (C, H, W).

- Upright: the EXIF orientation is applied. Of animations and multi-page files, the first frame.
- Transparency is laid over white.
- 16-bit grey is divided by 257, so that 65535 is 255. 16-bit colour files keep their high bytes.
- Palettes, CMYK, YCbCr become RGB; colour profiles are not applied. Colour becomes grey by ITU-R 601 luma.
- Cut centrally to the shape asked for, then scaled by Lanczos' filter with the support of the shrinking (antialiased).
  JPEGs of more than twice the size are read at a fraction of their resolution, still twice the size or more.
"""

from __future__ import annotations

from functools import cache
from typing import IO, TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000")
"""What is opened at all: others of Pillow's formats start programs (EPS) or hold no photographs."""
MAX_PIXELS = 2**27
_GREY_MODES = ("1", "L", "LA", "La", "I", "F")
_ORIENTATION = 0x0112


class Unreadable(Exception):
    """An image cannot be used; the message says why.

    Args:
        why: the message.
        passing: whether the file system would not give it, which may be mended while the file stays as it is.
    """

    def __init__(self, why: str, passing: bool = False) -> None:
        super().__init__(why)
        self.passing = passing


def suffixes() -> tuple[str, ...]:
    """The endings of the file names that are taken for images, lower case."""
    from PIL import Image

    return tuple(sorted(s for s, form in Image.registered_extensions().items() if form in _formats()))


@cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this build of Pillow reads."""
    from PIL import Image

    Image.init()
    return tuple(form for form in FORMATS if form in Image.OPEN)


def opened(file: str | IO[bytes]) -> Image:
    """Read a file's header.

    Raises:
        Unreadable: when it is no image or has too many pixels.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(file, formats=_formats())
    except UnidentifiedImageError as error:
        raise Unreadable("not an image, or of a format that is not read") from error
    except Exception as error:  # Pillow's parsers raise whatever damaged bytes lead them to
        raise _unreadable(error) from error
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise Unreadable(f"{image.width}×{image.height} pixels, more than the {MAX_PIXELS} that are read")
    return image


def looked_at(image: Image) -> tuple[int, tuple[int, int]]:
    """The channels and the size (H, W) that an image has of itself; its pixels are not read."""
    turned = _orientation(image) in (5, 6, 7, 8)
    width, height = (image.height, image.width) if turned else (image.width, image.height)
    return _channels(image), (height, width)


def decoded(image: Image, channels: int, size: tuple[int, int]) -> np.ndarray:
    """Read an image's pixels.

    Args:
        image: as `opened` gives it; it is closed.
        channels: 1 or 3.
        size: (H, W).

    Returns:
        uint8 (C, H, W).

    Raises:
        Unreadable: when it is truncated or damaged, or its pixels have no known range.
    """
    from PIL import ImageOps
    from PIL.Image import Resampling

    try:
        with image:
            image.draft(None, (2 * max(size), 2 * max(size)))
            orientation = _orientation(image)
            plain = _plain(image, channels)
            if orientation in range(2, 9):
                plain = plain.transpose(_turns()[orientation])
            if plain.size != (size[1], size[0]):
                plain = ImageOps.fit(plain, (size[1], size[0]), method=Resampling.LANCZOS)
            array = np.asarray(plain)
    except Unreadable:
        raise
    except Exception as error:  # as above
        raise _unreadable(error) from error
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def refitted(image: np.ndarray, channels: int, size: tuple[int, int]) -> np.ndarray:
    """An image in memory, uint8 (C, H, W), made to have other channels (1 from 3, 3 from 1) or another size."""
    from PIL import Image, ImageOps
    from PIL.Image import Resampling

    if image.shape[0] == 3 and channels == 1:
        image = np.asarray(Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).convert("L"))[None]
    if image.shape[1:] != size:
        planes = [ImageOps.fit(Image.fromarray(p), (size[1], size[0]), method=Resampling.LANCZOS) for p in image]
        image = np.stack([np.asarray(p) for p in planes])
    return np.repeat(image, channels, 0) if len(image) == 1 else image


def _plain(image: Image, channels: int) -> Image:
    """The first frame as "L" or "RGB"."""
    from PIL import Image as Images

    mode = "L" if channels == 1 else "RGB"
    if image.mode.startswith("I"):
        image = Images.fromarray(_high_byte(np.asarray(image)))
    elif image.mode == "F":
        raise Unreadable("floating-point pixels, whose range is not known")
    elif image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Images.alpha_composite(Images.new("RGBA", layer.size, "white"), layer)
    elif image.mode in ("P", "CMYK", "YCbCr", "LAB", "HSV"):
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _high_byte(values: np.ndarray) -> np.ndarray:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise Unreadable(f"integer pixels from {low} to {high}, whose range is not known")
    return np.rint(values / 257).astype(np.uint8)


def _channels(image: Image) -> int:
    return 1 if image.mode in _GREY_MODES or image.mode.startswith("I;") else 3


def _orientation(image: Image) -> Any:
    if image.format == "TIFF":  # Pillow turns these itself
        return None
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return None


def _turns() -> dict[int, Any]:
    from PIL.Image import Transpose as T

    return {
        2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE,
        6: T.ROTATE_270, 7: T.TRANSVERSE, 8: T.ROTATE_90,
    }  # fmt: skip


def _unreadable(error: Exception) -> Unreadable:
    # Pillow's own have no number
    passing = isinstance(error, OSError) and error.errno is not None
    return Unreadable(" ".join(str(error).split())[:200] or type(error).__name__, passing)
