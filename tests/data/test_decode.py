"""Image files of every odd kind: each gives the pixels a person would see, or one clear reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from dualout.data.cache import quiet
from dualout.data.decode import MAX_PIXELS, Unreadable, decoded, looked_at, opened, refitted, suffixes

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (9, 13, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (9, 13), dtype=np.uint8)


def saved(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return io.BytesIO(file.getvalue())


def read(file, channels=3, size=None):
    image = opened(file)
    own_channels, own_size = looked_at(image)
    return own_channels, decoded(image, channels, size or own_size)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "GIF"])
def test_lossless_formats_give_their_pixels(form):
    options = {"lossless": True} if form == "WEBP" else {}
    few = COLOUR & 0xC0 if form == "GIF" else COLOUR  # a palette of 64 holds these
    channels, array = read(saved(Image.fromarray(few), form, **options))
    assert channels == 3
    assert array.dtype == np.uint8
    assert array.flags.c_contiguous
    assert np.array_equal(array, few.transpose(2, 0, 1))


def test_grey():
    channels, array = read(saved(Image.fromarray(GREY)), 1)
    assert channels == 1
    assert np.array_equal(array, GREY[None])
    assert np.array_equal(read(saved(Image.fromarray(GREY)), 3)[1], np.stack([GREY] * 3))


def test_colour_as_grey_is_luma():
    _, array = read(saved(Image.fromarray(COLOUR)), 1)
    assert np.abs(array[0] - COLOUR @ [0.299, 0.587, 0.114]).max() <= 1


def test_black_and_white():
    bits = GREY > 127
    channels, array = read(saved(Image.fromarray(bits)), 1)
    assert channels == 1
    assert np.array_equal(array[0], np.where(bits, 255, 0))


def test_sixteen_bits():
    deep = RNG.integers(0, 65536, (9, 13), dtype=np.uint16)
    deep[0, :3] = 0, 65535, 32768
    expected = np.rint(deep / 257)
    for form in ("PNG", "TIFF"):
        channels, array = read(saved(Image.fromarray(deep), form), 1)
        assert channels == 1
        assert np.array_equal(array[0], expected)
    assert read(saved(Image.fromarray(deep)), 3)[1].shape == (3, 9, 13)


def test_sixteen_bit_colour_keeps_its_high_bytes():
    deep = (np.arange(4 * 5 * 3).reshape(4, 5, 3) * 1000).astype(">u2")
    lines = b"".join(b"\0" + row.tobytes() for row in deep)
    assert np.array_equal(read(png(5, 4, 16, 2, zlib.compress(lines)))[1], (deep >> 8).transpose(2, 0, 1))


def test_integers_and_floats_of_unknown_range_are_refused():
    for values, reason in [
        (np.full((3, 3), 70000, np.int32), "from 70000 to 70000"),
        (np.full((3, 3), -1, np.int32), "from -1 to -1"),
        (np.ones((3, 3), np.float32), "floating-point pixels"),
    ]:
        with pytest.raises(Unreadable, match=reason):
            read(saved(Image.fromarray(values), "TIFF"), 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_transparency_is_laid_over_white(channels):
    layered = np.dstack([COLOUR, np.zeros((9, 13), np.uint8)])
    layered[:, :4, 3] = 255
    layered[:, 4:8, 3] = 128
    own, array = read(saved(Image.fromarray(layered)), channels)
    assert own == 3
    alpha = layered[..., 3:] / 255
    expected = COLOUR * alpha + 255 * (1 - alpha)
    expected = expected.transpose(2, 0, 1) if channels == 3 else (expected @ [0.299, 0.587, 0.114])[None]
    assert np.abs(array - expected).max() <= 1.5
    assert (array[:, :, 8:] == 255).all()
    if channels == 3:
        assert np.array_equal(array[:, :, :4], COLOUR[:, :4].transpose(2, 0, 1))


def test_grey_with_transparency_is_grey():
    alpha = np.where(np.arange(13) < 6, 255, 0).astype(np.uint8) * np.ones((9, 1), np.uint8)
    image = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(alpha)])
    own, array = read(saved(image), 1)
    assert own == 1
    assert np.array_equal(array[0], np.where(alpha > 0, GREY, 255))


def test_palettes_with_and_without_transparency():
    numbers = RNG.integers(0, 4, (9, 13), dtype=np.uint8)
    colours = np.array([[255, 0, 0], [0, 200, 0], [10, 20, 30], [7, 7, 7]], np.uint8)
    image = Image.fromarray(numbers)
    image.putpalette(colours.tobytes())
    own, array = read(saved(image))
    assert own == 3
    assert np.array_equal(array, colours[numbers].transpose(2, 0, 1))
    _, clear = read(saved(image, transparency=1))
    assert np.array_equal(clear, np.where(numbers == 1, 255, array))
    _, clear = read(saved(image, transparency=bytes([255, 0, 255, 255])))
    assert np.array_equal(clear, np.where(numbers == 1, 255, array))


def test_print_colours():
    ink = np.zeros((8, 8, 4), np.uint8)
    ink[:4, :, 0] = 255  # cyan
    ink[4:, :, 3] = 255  # black
    own, array = read(saved(Image.fromarray(ink, "CMYK"), "TIFF"))
    assert own == 3
    assert array[:, 0, 0].tolist() == [0, 255, 255]
    assert array[:, 7, 0].tolist() == [0, 0, 0]
    _, array = read(saved(Image.fromarray(ink, "CMYK"), "JPEG", quality=100, subsampling=0))
    assert np.abs(array[:, 0, 0].astype(int) - [0, 255, 255]).max() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF"])
def test_photographs_stand_upright(orientation, form):
    upright = np.zeros((16, 24), np.uint8)
    upright[:8, :8] = 255  # a light corner at the top left
    undo = {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: np.transpose,
        6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).T, 8: lambda a: np.rot90(a, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} if form == "JPEG" else {}
    file = saved(Image.fromarray(np.ascontiguousarray(undo(upright))), form, exif=exif, **options)
    image = opened(file)
    assert looked_at(image) == (1, (16, 24))
    array = decoded(image, 1, (16, 24))
    assert np.abs(array[0].astype(int) - upright).max() < 10


def test_a_damaged_orientation_is_no_reason_to_refuse():
    image = Image.fromarray(COLOUR)
    for exif in (b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"):
        with quiet():
            assert read(saved(image, exif=exif))[1].shape == (3, 9, 13)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_several(form):
    frames = [Image.fromarray(np.full((6, 7, 3), v, np.uint8)) for v in (255, 0, 100)]
    options = {"lossless": True} if form == "WEBP" else {}
    file = saved(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert (read(file)[1] == 255).all()


def test_cut_centrally_and_scaled():
    wide = np.zeros((8, 16), np.uint8)
    wide[:, 4:12] = np.arange(0, 256, 32, dtype=np.uint8)
    assert np.array_equal(read(saved(Image.fromarray(wide)), 1, (8, 8))[1][0], wide[:, 4:12])
    high = saved(Image.fromarray(np.ascontiguousarray(wide.T)))
    assert np.array_equal(read(high, 1, (8, 8))[1][0], wide.T[4:12])
    # a fine checkerboard becomes an even grey, where a filter without antialiasing leaves stripes
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    assert np.abs(read(saved(Image.fromarray(board)), 1, (20, 20))[1].astype(int) - 127.5).max() < 3


def test_large_photographs_are_read_at_a_fraction_with_the_same_result():
    smooth = np.add.outer(np.linspace(0, 200, 1200), np.linspace(0, 55, 900)).astype(np.uint8)
    file = saved(Image.fromarray(smooth), "JPEG", quality=95)
    small = read(file, 1, (32, 24))[1].astype(float)[0]
    exact = refitted(smooth[None], 1, (32, 24))[0].astype(float)
    assert np.abs(small - exact).max() <= 2


@pytest.mark.parametrize(("size", "shape"), [((3, 2000), (8, 8)), ((1, 1), (5, 9)), ((2000, 1), (16, 4))])
def test_extreme_shapes(size, shape):
    image = Image.fromarray(np.full(size, 77, np.uint8))
    assert (read(saved(image), 1, shape)[1] == 77).all()


def png(width, height, depth, kind, data, *more):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    body = b"".join(chunk(*c) for c in more) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body)


def test_bombs_are_refused_by_their_header():
    with pytest.raises(Unreadable, match="pixels"):
        read(png(50_000, 50_000, 8, 0, zlib.compress(b"\0" * 100)))
    side = int(MAX_PIXELS**0.5) + 1
    with pytest.raises(Unreadable, match=f"more than the {MAX_PIXELS}"), pytest.warns(Image.DecompressionBombWarning):
        read(png(side, side, 8, 0, zlib.compress(b"\0" * 100)))
    with pytest.raises(Unreadable, match="too large"):
        read(png(8, 8, 8, 0, zlib.compress(b"\0" * 72), (b"zTXt", b"c\0\0" + zlib.compress(b"a" * 10**8))))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM"])
def test_truncated_and_changed_files_are_refused_or_read(form):
    whole = saved(Image.fromarray(COLOUR.repeat(8, 0).repeat(8, 1)), form).getvalue()
    with pytest.raises(Unreadable):
        read(io.BytesIO(whole[: len(whole) // 2]))
    rng = np.random.default_rng(1)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            damaged[place] ^= 1 << rng.integers(0, 8)
        if rng.random() < 0.3:
            damaged = damaged[: rng.integers(0, len(damaged))]
        try:
            _, array = read(io.BytesIO(bytes(damaged)), 3, (16, 16))
        except Unreadable:
            continue
        else:
            assert array.shape == (3, 16, 16)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\x89PNG\r\n\x1a\n"]
)
def test_what_is_no_image(content):
    with pytest.raises(Unreadable, match=r"not an image|broken|truncated|unexpected"):
        read(io.BytesIO(content))


def test_programs_are_never_started():
    assert ".eps" not in suffixes()
    assert {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"} <= set(suffixes())


def test_a_colour_profile_does_no_harm():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(read(saved(Image.fromarray(COLOUR), icc_profile=profile))[1], COLOUR.transpose(2, 0, 1))


def test_refitted_keeps_other_channels():
    image = RNG.integers(0, 256, (5, 8, 8), dtype=np.uint8)
    assert refitted(image, 5, (4, 4)).shape == (5, 4, 4)
    assert np.array_equal(refitted(image, 5, (8, 8)), image)
