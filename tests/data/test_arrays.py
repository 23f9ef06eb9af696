import io
import os
import zipfile

import numpy as np
import pytest
import torch

from dualout import InputError
from dualout.data import load

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (20, 8, 6, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (20, 8, 6), dtype=np.uint8)
LABELS = RNG.integers(0, 4, 20)
LABELS[0] = 3


@pytest.fixture
def file(tmp_path):
    def save(*array, name="x", packed=False, **arrays):
        if array:
            np.save(tmp_path / f"{name}.npy", array[0])
            return f"arrays:{tmp_path}/{name}.npy"
        (np.savez_compressed if packed else np.savez)(tmp_path / f"{name}.npz", **arrays)
        return f"arrays:{tmp_path}/{name}.npz"

    return save


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (GREY, GREY[:, None]),
        (COLOUR, COLOUR.transpose(0, 3, 1, 2)),
        (COLOUR.transpose(0, 3, 1, 2), COLOUR.transpose(0, 3, 1, 2)),
        (GREY[..., None], GREY[:, None]),
        (GREY[:, None], GREY[:, None]),
        (np.asfortranarray(COLOUR), COLOUR.transpose(0, 3, 1, 2)),
    ],
)
@pytest.mark.parametrize("how", ["npy", "npz", "packed"])
def test_layouts(file, array, expected, how):
    spec = file(array) if how == "npy" else file(images=array, packed=how == "packed")
    found = load(spec)
    assert isinstance(found.stored, np.memmap) == (how != "packed")
    assert found.shape == expected.shape[1:]
    numbers = [7, 0, 19, 7]
    batch = found.batch(numbers)
    assert batch.is_contiguous()
    assert np.array_equal(batch, expected[numbers])


def test_labels(file):
    found = load(file(images=COLOUR, labels=LABELS))
    assert found.labels.dtype == torch.int64
    assert np.array_equal(found.labels, LABELS)
    assert found.classes == ("0", "1", "2", "3")
    assert np.array_equal(load(file(images=COLOUR, labels=LABELS[:, None].astype(np.uint8))).labels, LABELS)
    assert load(file(images=COLOUR)).labels is None


def test_other_names(file):
    assert len(load(file(arr_0=COLOUR, arr_1=LABELS)).labels) == 20
    spec = file(x_train=COLOUR, y_train=LABELS)
    with pytest.raises(InputError, match="no array 'images', but x_train, y_train"):
        load(spec)
    assert np.array_equal(load(f"{spec}:images=x_train:labels=y_train").labels, LABELS)
    assert load(f"{spec}:images=x_train").labels is None
    with pytest.raises(InputError, match="no array 'y'"):
        load(f"{spec}:images=x_train:labels=y")


def test_arrays_that_are_not_read_are_told_of_where_there_are_no_classes(file):
    (note,) = load(file(images=COLOUR, y=LABELS)).notes
    assert "no array 'labels', but y; name one by labels=y" in note
    assert load(file(images=COLOUR, labels=LABELS, y=LABELS)).notes == ()
    (note,) = load(file((GREY > 99).astype(np.uint8))).notes
    assert "from 0 to 1, where 0 is black and 255 white" in note
    assert load(file((GREY > 99).astype(np.float32))).notes == ()


def test_a_share_held_out(file):
    spec = file(images=COLOUR.repeat(20, 0), labels=LABELS.repeat(20)) + ":holdout=0.25"
    train, test, everything = (load(spec, split=s) for s in ("train", "test", "all"))
    assert len(train) + len(test) == len(everything) == 400
    assert 60 < len(test) < 140
    assert np.array_equal(test.labels, LABELS.repeat(20)[test.rows])
    assert torch.equal(test[5], everything[int(test.rows[5])])
    assert train.classes == test.classes
    with pytest.raises(InputError, match="no test split"):
        load(spec.replace(":holdout=0.25", ""), split="test")


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, ">f4"])
@pytest.mark.parametrize(("black", "white"), [(0, 1), (-1, 1)])
def test_floating_images(file, kind, black, white):
    values = (black + (white - black) * (COLOUR / 255)).astype(kind)
    found = load(file(values))
    assert not found.latents
    assert np.array_equal(found.batch(range(20)), COLOUR.transpose(0, 3, 1, 2))


def test_floats_that_may_be_of_either_range_are_told(file):
    values = np.linspace(0.25, 1, 20 * 48, dtype=np.float32).reshape(20, 8, 6)
    found = load(file(values))
    (note,) = found.notes
    assert "values from 0.25 to 1, read with 0 for black" in note
    assert "values=[-1+1]" in note
    assert found.batch(range(20)).min() == 64
    said = load(f"{file(values)}:values=[-1+1]")
    assert (said.batch(range(20)).min(), len(load(f"{file(values)}:values=[0+1]").notes)) == (159, 0)
    values[7] = 0
    assert load(file(values)).notes == ()


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_one_image_is_not_taken_for_its_rows(file, kind):
    image = (COLOUR[0] / 255 if kind is np.float32 else COLOUR[0]).astype(kind)
    for channels, message in [
        (3, r"\(8, 6, 3\) may be 8 grey images of 6×3, or one image of 3 channels; .*layout=nhw.* array of 1×8×6×3"),
        (1, r"\(8, 6, 1\) may be 8 grey images of 6×1, or one image of 1 channel; .*layout=nhw.* array of 1×8×6×1"),
    ]:
        with pytest.raises(InputError, match=message):
            load(file(image[..., :channels]))
    assert load(f"{file(image)}:layout=nhw").shape == (1, 6, 3)
    assert load(file(COLOUR[:1])).shape == (3, 8, 6)
    assert load(f"{file(image.astype(np.float32))}:latents=true").shape == (1, 6, 3)


def test_floating_images_of_other_ranges_must_say_so(file):
    values = COLOUR.astype(np.float32)
    spec = file(values)
    with pytest.raises(InputError, match=r"from 0 to 255.*values=\[0\+255\].*latents=true"):
        load(spec)
    assert np.array_equal(load(f"{spec}:values=[0+255]").batch(range(20)), COLOUR.transpose(0, 3, 1, 2))
    inverted = load(f"{spec}:values=[255+0]").batch(range(20))
    assert np.array_equal(inverted, 255 - COLOUR.transpose(0, 3, 1, 2))
    slightly_over = file(np.array([[[0.0, 1.02], [-0.01, 0.5]]], np.float32))
    with pytest.raises(InputError, match=r"from -0.01 to 1.02"):
        load(slightly_over)
    assert load(f"{slightly_over}:values=[0+1]")[0].flatten().tolist() == [0, 255, 0, 128]


def test_the_last_value_is_looked_at_too(file, monkeypatch):
    monkeypatch.setattr("dualout.data.arrays._CHECKED_BYTES", 1000)
    values = np.zeros((100, 8, 8), np.float32)
    values[-1, -1, -1] = 7
    with pytest.raises(InputError, match="from 0 to 7"):
        load(file(values))
    values[71, 3, 3] = np.nan
    with pytest.raises(InputError, match="NaN or infinite values, the first in image 71"):
        load(file(values))
    values[71, 3, 3] = -np.inf
    with pytest.raises(InputError, match="the first in image 71"):
        load(f"{file(values)}:latents=true")


def test_latents_are_given_as_they_are(file):
    latents = RNG.normal(0, 5, (10, 4, 3, 3)).astype(np.float32)
    found = load(f"{file(latents)}:latents=true")
    assert found.latents
    assert found.shape == (4, 3, 3)
    assert np.array_equal(found.batch(range(10)), latents)
    assert "latents" in repr(found)
    last = load(f"{file(latents.transpose(0, 2, 3, 1).astype(np.float16))}:latents=true:layout=nhwc")
    assert last.batch([3]).dtype == torch.float32
    assert np.array_equal(last.batch([3])[0], latents[3].astype(np.float16))
    for wrong in (":size=8", ":grey=true"):
        with pytest.raises(InputError, match="latents are no pictures"):
            load(f"{file(latents)}:latents=true{wrong}")
    with pytest.raises(InputError, match="latents are floating"):
        load(f"{file(COLOUR)}:latents=true")


def test_size_and_grey(file, tmp_path):
    found = load(f"{file(images=COLOUR, labels=LABELS)}:size=4:grey=true", cache=tmp_path / "cache")
    assert found.shape == (1, 4, 4)
    assert np.array_equal(found.labels, LABELS)
    assert isinstance(found.stored, np.memmap)
    wide = RNG.integers(0, 256, (5, 8, 8, 6), dtype=np.uint8)
    assert load(f"{file(wide)}:layout=nhwc:size=4").shape == (6, 4, 4)
    with pytest.raises(InputError, match="neither grey nor colour"):
        load(f"{file(wide)}:layout=nhwc:grey=true")
    floating = load(f"{file(COLOUR / 255)}:size=4")
    assert torch.equal(floating[3], load(f"{file(COLOUR)}:size=4")[3])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((0, 8, 8), np.uint8), r"no images: an array of shape \(0, 8, 8\)"),
        (np.zeros((5, 0, 8), np.uint8), "no images"),
        (np.zeros((5, 8), np.uint8), "images are N×H×W"),
        (np.zeros(5, np.uint8), "images are N×H×W"),
        (np.zeros((), np.uint8), "images are N×H×W"),
        (np.zeros((2, 2, 2, 2, 2), np.uint8), "images are N×H×W"),
        (np.zeros((5, 3, 8, 3), np.uint8), "may be either; say layout"),
        (np.zeros((5, 8, 8, 4), np.uint8), "no side of 1 or 3 channels; say layout"),
        (np.zeros((5, 8, 8), np.int64), "type int64; images are uint8"),
        (np.zeros((5, 8, 8), np.uint16), "type uint16"),
        (np.zeros((5, 8, 8), bool), "type bool"),
        (np.zeros((5, 8, 8), complex), "type complex128"),
        (np.full((5, 8, 8), "x"), "type <U1"),
    ],
)
def test_arrays_that_are_no_images(file, array, message):
    for spec in (file(array), file(images=array), file(images=array, packed=True)):
        with pytest.raises(InputError, match=message):
            load(spec)


def test_options_that_do_not_fit(file):
    with pytest.raises(InputError, match="layout=nchw does not fit"):
        load(f"{file(GREY)}:layout=nchw")
    with pytest.raises(InputError, match="leave values out"):
        load(f"{file(GREY)}:values=[0+1]")
    assert load(f"{file(np.zeros((5, 3, 8, 3), np.uint8))}:layout=nhwc").shape == (3, 3, 8)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS[:-1], r"20 images but labels of shape \(19,\)"),
        (LABELS[None], "20 images but labels of shape"),
        (np.eye(20), "20 images but labels of shape"),
        (LABELS - 1, "counted from 0"),
        (LABELS * 1.0, "got float64 from 0.0 to 3.0"),
        (LABELS + 2**40, "counted from 0"),
        (np.array(["a"] * 20), "counted from 0"),
    ],
)
def test_labels_that_cannot_be_used(file, labels, message):
    with pytest.raises(InputError, match=message):
        load(file(images=COLOUR, labels=labels))


def test_nothing_is_ever_unpickled(file, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (f"{tmp_path}/evil",)

    array = np.array([Evil()] * 3, dtype=object)
    for spec in (file(array), file(images=array), file(images=array, packed=True), file(images=COLOUR, labels=array)):
        with pytest.raises(InputError, match=r"[oO]bject"):
            load(spec)
    assert not (tmp_path / "evil").exists()


def test_files_that_are_missing_or_something_else(tmp_path):
    with pytest.raises(InputError, match="no file at"):
        load(f"arrays:{tmp_path}/none.npz")
    with pytest.raises(InputError, match="is no file"):
        load(f"arrays:{tmp_path}")
    for name, content, message in [
        ("a.npy", b"", "begins with nothing"),
        ("b.npy", b"hello world", "not a .npy file"),
        ("c.npz", b"hello world", "damaged or no .npz file"),
        ("d.npz", b"", "damaged or no .npz file"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            load(f"arrays:{tmp_path / name}")
    with zipfile.ZipFile(tmp_path / "e.npz", "w") as archive:
        archive.writestr("readme.txt", "no arrays")
    with pytest.raises(InputError, match="no array 'images', but readme"):
        load(f"arrays:{tmp_path}/e.npz")


@pytest.mark.parametrize("how", ["npy", "npz", "packed"])
def test_damaged_files_give_an_error_or_an_array(tmp_path, how):
    whole = io.BytesIO()
    match how:
        case "npy":
            np.save(whole, COLOUR)
        case "npz":
            np.savez(whole, images=COLOUR, labels=LABELS)
        case "packed":
            np.savez_compressed(whole, images=COLOUR, labels=LABELS)
    path, content = tmp_path / f"x.{'npy' if how == 'npy' else 'npz'}", whole.getvalue()
    rng = np.random.default_rng(2)
    refused = []
    for attempt in range(150):
        damaged = bytearray(content)
        # headers are where damage does harm: hit them more often
        for place in rng.integers(0, [len(content), 200][attempt % 2], 4):
            damaged[place] ^= 1 << rng.integers(0, 8)
        if attempt % 5 == 0:
            damaged = damaged[: rng.integers(0, len(damaged))]
        path.write_bytes(damaged)
        try:
            found = load(f"arrays:{path}")
            found.batch(range(len(found)))
        except InputError as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert all(str(path) in message for message in refused)


def test_latents_far_from_unit_variance_are_told_of(file):
    latents = np.random.default_rng(0).normal(size=(20, 4, 8, 8)).astype(np.float32)
    assert load(f"{file(latents)}:latents=true").notes == ()
    for scales in ([1, 1, 1, 6], [0.1] * 4):
        given = latents * np.array(scales, np.float32)[:, None, None]
        (note,) = load(f"{file(given)}:latents=true").notes
        spread = ", ".join(f"{s:.3g}" for s in given.std((0, 2, 3), dtype=np.float64))
        assert f"standard deviations of {spread}, where" in note


def test_a_header_that_promises_too_much(tmp_path):
    head = np.lib.format.header_data_from_array_1_0(COLOUR) | {"shape": (10**9, 10**4, 10**3, 3)}
    for packing in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        body = io.BytesIO()
        np.lib.format.write_array_header_1_0(body, head)
        with zipfile.ZipFile(tmp_path / "x.npz", "w", packing) as archive:
            archive.writestr("images.npy", body.getvalue())
        with pytest.raises(InputError, match=r"shorter than|too large|cannot be read"):
            load(f"arrays:{tmp_path}/x.npz")
    (tmp_path / "x.npy").write_bytes(body.getvalue())
    with pytest.raises(InputError, match="cannot be read"):
        load(f"arrays:{tmp_path}/x.npy")
