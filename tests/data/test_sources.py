import dataclasses

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_sample_images

from dualout import InputError, data
from dualout.data import Arrays, Dataset, Digits, Folder, Photos, Source, load, open_source


def test_every_source_is_found_by_its_name():
    assert set(Source.kinds()) == {"digits", "photos", "folder", "arrays", "idx", "hub"}


@pytest.mark.parametrize(
    ("spec", "source"),
    [
        ("digits", Digits()),
        (" digits:split=test ", Digits(split="test")),
        ("photos:size=48x64:grey=true", Photos(size=(48, 64), grey=True)),
        ("photos:size=[48+64]", Photos(size=(48, 64))),
        ("folder:/my/images:size=64:grey=false", Folder("/my/images", size=64, grey=False)),
        ("folder:path=/my/images:size=64", Folder("/my/images", size=64)),
        ("folder:size=64:path=/my/images", Folder("/my/images", size=64)),
        ("folder:/odd:name/a=b:split=all", Folder("/odd:name/a=b", split="all")),
        (r"folder:C:\images:size=8", Folder(r"C:\images", size=8)),
        ("folder:1234", Folder("1234")),
        ("folder:x:holdout=1e-1", Folder("x", holdout=0.1)),
        ("arrays:x.npy:values=[0+255]", Arrays("x.npy", values=(0, 255))),
    ],
)
def test_specs(spec, source):
    assert open_source(spec) == source
    assert open_source(source.spec) == source
    assert Source.from_config(source.config()) == source


def test_a_spec_wins_over_the_keywords():
    assert open_source("digits:split=test", split="all", size=12) == Digits(split="test", size=12)
    assert open_source(Digits(split="test"), split="all", size=12) == Digits(split="test", size=12)
    assert open_source(Digits(), split="all", grey=None) == Digits(split="all")


def test_a_spec_begins_with_the_place():
    source = Folder("/my/images", size=(4, 6), holdout=0.2)
    assert source.spec == "folder:path=/my/images:size=[4+6]:holdout=0.2"
    assert open_source(source.spec) == source


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digit", "did you mean 'digits'"),
        ("", "Known: arrays, digits"),
        ("digits:8", "options are written key=value"),
        ("digits:sise=8", "did you mean 'size'"),
        ("digits:size=0", "size is a number of pixels"),
        ("digits:size=-3", "size is a number"),
        ("digits:size=big", "size of data source"),
        ("digits:size=[1+2+3]", "size is a number"),
        ("digits:size=[", "size of data source"),
        ("digits:size=true", "size of data source"),
        ("digits:size=99999999", "size is a number"),
        ("digits:size=8:size=9", "'size' twice"),
        ("digits:grey=5", "grey of data source 'digits' is true or false"),
        ("digits:split=dev", "unknown split 'dev'"),
        ("folder", "write folder:PATH"),
        ("folder:", "write folder:PATH"),
        ("folder:size=64", "write folder:PATH"),
        ("hub", "write hub:REPOSITORY"),
        ("folder:x:holdout=1", "from 0 to below 1"),
        ("folder:x:holdout=yes", "holdout of data source"),
        ("arrays:x.npy:layout=chw", "unknown layout"),
        ("arrays:x.npy:values=7", "values of"),
        ("arrays:x.npy:values=[0+0]", "values=\\[0\\+1\\]"),
        ("arrays:x.npy:values=[1]", "values=\\[0\\+1\\]"),
        ("arrays:x.npy:latents=7", "latents of data source"),
    ],
)
def test_specs_that_cannot_be_used(spec, message):
    with pytest.raises(InputError, match=message):
        open_source(spec)


def test_the_path_of_something_is_answered_with_what_to_write(tmp_path):
    with pytest.raises(InputError, match=f"write folder:{tmp_path}"):
        load(str(tmp_path))
    np.save(tmp_path / "x.npy", np.zeros((1, 2, 2), np.uint8))
    with pytest.raises(InputError, match=f"write arrays:{tmp_path}/x.npy"):
        load(f"{tmp_path}/x.npy")
    with pytest.raises(InputError, match=f"write folder:{tmp_path}"):
        load(tmp_path)
    with pytest.raises(InputError, match=r"got a ndarray.*Dataset\('mine', array, 'nhwc'\)"):
        load(np.zeros((1, 2, 2), np.uint8))


def test_a_path_is_written_down_as_text(tmp_path):
    np.save(tmp_path / "some.npy", np.zeros((3, 8, 8), np.uint8))
    source = Arrays(tmp_path / "some.npy")
    assert source == Arrays(str(tmp_path / "some.npy"))
    assert load(source, size=np.int64(4)).name == f"arrays:path={tmp_path / 'some.npy'}:size=4"
    assert Folder(tmp_path).config()["path"] == str(tmp_path)


def test_digits():
    everything = load("digits", split="all")
    assert len(everything) == 1797
    assert everything.shape == (1, 8, 8)
    assert repr(everything) == "digits:split=all: 1,797 images 1×8×8, 10 classes"
    original = load_digits()
    images = everything.batch(np.arange(1797))
    assert images.dtype == torch.uint8
    assert images.max() == 255
    assert np.abs(images[:, 0].numpy() / 255 * 16 - original.images).max() < 0.5 * 16 / 255 + 1e-9
    assert np.array_equal(
        np.unique(images), [0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255]
    )
    assert np.array_equal(everything.labels, original.target)


def test_digits_are_split_evenly_and_wholly():
    train, test, everything = (load("digits", split=s) for s in ("train", "test", "all"))
    assert len(train) + len(test) == len(everything)
    assert len(test) == 296
    share = np.bincount(test.labels) / np.bincount(everything.labels)
    assert share.min() > 0.155
    assert share.max() < 0.17
    together = torch.cat([d.batch(np.arange(len(d))) for d in (train, test)]).flatten(1)
    original = everything.batch(np.arange(1797)).flatten(1)
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, original.tolist()))
    assert len({train.fingerprint, test.fingerprint, everything.fingerprint}) == 3


def test_photos_are_crops_of_the_photographs():
    train, test = load("photos"), load("photos:split=test")
    assert train.shape == (3, 32, 32)
    assert train.classes == ("china", "flower")
    originals = load_sample_images().images
    rows = (427 - 32) // 8 + 1
    assert np.bincount(train.labels).tolist() == [rows * 61] * 2
    assert np.bincount(test.labels).tolist() == [rows * 13] * 2
    assert torch.equal(train[62], torch.tensor(originals[0][8:40, 8:40]).permute(2, 0, 1))
    assert torch.equal(test[-1], torch.tensor(originals[1][392:424, 608:640]).permute(2, 0, 1))


def test_photos_of_another_size_are_larger_crops_not_larger_pixels():
    large = load("photos", size=(40, 64))
    assert large.shape == (3, 40, 64)
    assert torch.equal(large[0][:, :32, :32], load("photos")[0])
    with pytest.raises(InputError, match="larger than the part of the photographs"):
        load("photos:split=test", size=129)


def test_grey_and_colour():
    colour, grey = load("photos"), load("photos", grey=True)
    assert grey.shape == (1, 32, 32)
    luma = colour[5].float().mul(torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    assert (luma - grey[5][0]).abs().max() <= 1
    digits = load("digits", grey=False)
    assert digits.shape == (3, 8, 8)
    assert torch.equal(digits[7], load("digits")[7].expand(3, 8, 8))
    assert torch.equal(digits.labels, load("digits").labels)


def test_sizes():
    large, small = load("digits", size=16), load("digits", size=(4, 8))
    assert large.shape == (1, 16, 16)
    assert small.shape == (1, 4, 8)
    # wider than high: the middle rows alone are kept, then nothing needs to be scaled
    assert torch.equal(small[3], load("digits")[3][:, 2:6])
    assert large[3].float().mean() == pytest.approx(load("digits")[3].float().mean(), abs=4)


def test_the_same_images_have_the_same_fingerprint_wherever_they_come_from(tmp_path):
    digits = load("digits")
    images = digits.batch(np.arange(len(digits)))[:, 0].numpy()
    np.savez(tmp_path / "digits.npz", images=images, labels=digits.labels.numpy())
    again = load(f"arrays:{tmp_path}/digits.npz")
    assert again.fingerprint == digits.fingerprint
    images[700, 3, 3] ^= 1
    np.savez(tmp_path / "changed.npz", images=images, labels=digits.labels.numpy())
    assert load(f"arrays:{tmp_path}/changed.npz").fingerprint != digits.fingerprint
    labels = digits.labels.numpy().copy()
    labels[3] += 1
    np.savez(tmp_path / "labels.npz", images=digits.stored[digits.rows], labels=labels)
    assert load(f"arrays:{tmp_path}/labels.npz").fingerprint != digits.fingerprint


def test_images_are_had_by_number():
    digits = load("digits")
    numbers = [4, 0, 4]
    for asked in (numbers, np.array(numbers), torch.tensor(numbers)):
        found = digits.batch(asked)
        assert found.shape == (3, 1, 8, 8)
        assert torch.equal(found[1], digits[0])
        assert torch.equal(found[0], found[2])
    with pytest.raises(IndexError):
        digits.batch([len(digits)])
    assert digits.batch([]).shape == (0, 1, 8, 8)


def test_a_mask_is_no_list_of_numbers():
    found, mask = load("digits"), np.arange(len(load("digits"))) < 5
    assert len(found.select(mask)) == 5
    for numbers in (mask, [1.7, 2.2]):
        with pytest.raises(InputError, match="images have whole numbers; a mask is for select"):
            found.batch(numbers)
    assert len(found.batch([])) == 0
    for rows in (np.arange(len(found.stored)) < 5, [0, 1], np.array([0, len(found.stored)]), np.array([-1, 0])):
        with pytest.raises(InputError, match=f"integers from 0 to {len(found.stored) - 1}; a mask is for select"):
            Dataset("mine", found.stored, "nhw", rows=rows)
    with pytest.raises(InputError, match="of black and of white"):
        Dataset("mine", found.stored / 16, "nhw", scale=(1.0, 1.0))


def test_some_of_a_dataset():
    digits = load("digits")
    twos = digits.select(digits.labels == 2)
    assert set(twos.labels.tolist()) == {2}
    some = digits.select([5, 9, 2])
    assert len(some) == 3
    assert torch.equal(some[1], digits[9])
    assert some.labels[2] == digits.labels[2]
    assert torch.equal(some.select([2])[0], digits[2])
    # those of an array, too, and of the mask that a comparison gives
    stored = np.arange(4 * 6 * 5, dtype=np.uint8).reshape(4, 6, 5)
    mine = Dataset("mine", stored, "nhw", labels=torch.tensor([2, 0, 2, 1]))
    twos = mine.select(mine.labels == 2)
    assert len(twos) == 2
    assert torch.equal(twos.batch([0, 1]), mine.batch([0, 2]))


@pytest.mark.parametrize("strict", [-0.1, 1.5, True])
def test_strict_is_a_share(strict):
    with pytest.raises(InputError, match=r"strict is the share|strict of data source 'digits' is a number"):
        load("digits", strict=strict)


def test_sources_are_final_and_written_down():
    for name, kind in Source.kinds().items():
        assert dataclasses.is_dataclass(kind), name
        assert kind.__doc__, name
        assert not kind.__subclasses__(), name
    assert data.to_model(load("digits").batch([0])).min() == -1
