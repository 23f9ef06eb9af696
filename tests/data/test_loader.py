import subprocess
import sys
import threading
from itertools import islice

import numpy as np
import pytest
import torch

from dualout import InputError
from dualout.data import Dataset, Loader, load, order, pixels


@pytest.fixture(scope="module")
def colours():
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 256, (70, 3, 6, 5), dtype=np.uint8)
    return Dataset("colours", stored, labels=torch.arange(70) % 7, classes=tuple("abcdefg"))


def batches(dataset, batch_size, start=0, stop=None, prefetch=4, workers=1, **options):
    return Loader(dataset, batch_size, **options).batches(start, stop, prefetch=prefetch, workers=workers)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"stored": torch.zeros(4, 3, 8, 8)}, r"a numpy array.*got a Tensor of shape \(4, 3, 8, 8\)"),
        ({"stored": np.zeros((4, 8, 8), np.uint8)}, r"layout 'nchw', one of nhw, nhwc, nchw; got .* \(4, 8, 8\)"),
        ({"layout": "hwc"}, "unknown layout 'hwc'; did you mean 'nhwc'"),
        ({"stored": np.zeros((4, 3, 8, 8), np.int64)}, "uint8 or floats, latents are floats; got int64"),
        ({"labels": np.arange(4)}, r"LongTensor, one .* 4 images; got a ndarray of int64 and shape \(4,\)"),
        ({"labels": torch.arange(3)}, r"got a Tensor of torch.int64 and shape \(3,\)"),
        ({"labels": torch.arange(4), "rows": np.arange(2)}, "each of the 2 images"),
        ({"labels": torch.arange(4), "classes": ("a", "b", "c")}, "count 3 classes from 0, got 0 to 3"),
        ({"labels": torch.arange(4) - 1, "classes": ("a", "b", "c")}, "count 3 classes from 0, got -1 to 2"),
    ],
)
def test_arrays_that_are_no_images_are_refused_at_once(given, said):
    with pytest.raises(InputError, match=said):
        Dataset("mine", **{"stored": np.zeros((4, 3, 8, 8), np.uint8), **given})


def test_batches_are_what_the_order_says(colours):
    for step, batch in enumerate(batches(colours, 32, seed=3, stop=10)):
        samples = np.arange(step * 32, step * 32 + 32)
        rows = order.indices(3, 70, step * 32, 32)
        assert batch.step == step
        assert np.array_equal(batch.samples, samples)
        assert np.array_equal(batch.rows, rows)
        assert torch.equal(batch.labels, colours.labels[torch.from_numpy(rows)])
        assert torch.equal(batch.images, pixels.to_model(colours.batch(rows)))
    assert step == 9


def test_mirrors_the_samples_that_it_should(colours):
    plain = batches(colours, 50, seed=1, stop=4, floats=False)
    mirrored = batches(colours, 50, seed=1, stop=4, floats=False, flip=True)
    seen = []
    for a, b in zip(plain, mirrored, strict=True):
        flipped = order.flips(1, a.samples)
        seen += flipped.tolist()
        assert a.images.dtype == torch.uint8
        for image, other, turned in zip(a.images, b.images, flipped, strict=True):
            assert torch.equal(other, image.flip(-1) if turned else image)
    assert 0.3 < np.mean(seen) < 0.7


@pytest.mark.parametrize("start", [1, 7, 163, 5000])
def test_goes_on_from_any_step(colours, start):
    for a, b in zip(
        islice(batches(colours, 24, seed=9, start=start, flip=True), 5),
        islice(batches(colours, 24, seed=9, start=start - 1, flip=True), 1, 6),
        strict=True,
    ):
        assert a.step == b.step
        assert torch.equal(a.images, b.images)
        assert np.array_equal(a.samples, b.samples)


@pytest.mark.parametrize("world", [2, 3, 8])
def test_processes_share_a_batch(colours, world):
    alone = list(batches(colours, 24, seed=2, stop=6, flip=True))
    shared = [list(batches(colours, 24, seed=2, stop=6, flip=True, rank=r, world=world)) for r in range(world)]
    for step, batch in enumerate(alone):
        assert torch.equal(batch.images, torch.cat([part[step].images for part in shared]))
        assert np.array_equal(batch.samples, np.concatenate([part[step].samples for part in shared]))
        assert torch.equal(batch.labels, torch.cat([part[step].labels for part in shared]))


@pytest.mark.parametrize("options", [{"prefetch": 0}, {"prefetch": 1}, {"prefetch": 9, "workers": 4}])
def test_how_they_are_made_changes_nothing(colours, options):
    usual = batches(
        colours, 300, seed=2, stop=40, flip=True
    )  # more than one epoch a batch, several blocks of the order
    for a, b in zip(usual, batches(colours, 300, seed=2, stop=40, flip=True, **options), strict=True):
        assert torch.equal(a.images, b.images)


def test_stopping_early_ends_the_thread(colours):
    before = threading.active_count()
    loader = batches(colours, 8)
    next(loader)
    assert threading.active_count() > before
    loader.close()
    assert threading.active_count() == before


def test_left_open_to_the_interpreters_end_it_says_nothing():
    # a logging handler may hold it, and that module is emptied after those that the generators rest on
    program = (
        "import logging\n"
        "from dualout.data import load\n"
        "from dualout.training import TrainConfig\n"
        "from dualout.training.batches import Batches\n"
        "logging.held = Batches(load('digits'), TrainConfig(workers=2), 1000).after(0)\n"
        "next(logging.held)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_error_in_the_background_is_raised_here(colours):
    broken = Dataset("broken", colours.stored, rows=np.array([0, 1, 2]))
    broken.rows[2] = 999
    with pytest.raises(IndexError):
        list(batches(broken, 3, stop=2))


def test_batches_own_their_memory(colours):
    before = colours.stored.copy()
    for batch in batches(colours, 16, stop=3, floats=False):
        batch.images.zero_()
    assert np.array_equal(colours.stored, before)


def test_refuses_what_cannot_be_shared(colours):
    with pytest.raises(InputError, match="multiple of the number of processes, got 10 for 4"):
        batches(colours, 10, world=4)
    with pytest.raises(InputError, match="positive"):
        batches(colours, 0)
    latents = Dataset("latents", np.zeros((4, 4, 2, 2), np.float32))
    with pytest.raises(InputError, match="mirrored"):
        batches(latents, 2, flip=True)
    assert next(batches(latents, 2)).images.dtype == torch.float32


@pytest.mark.parametrize("wrong", [{"rank": 1}, {"rank": -1}, {"start": -1}, {"prefetch": -1}, {"workers": 0}])
def test_refuses_what_makes_no_sense(colours, wrong):
    with pytest.raises(ValueError, match="Must have "):
        batches(colours, 8, **wrong)


def test_digits_train_in_every_digit():
    seen = np.concatenate([b.labels.numpy() for b in batches(load("digits"), 100, stop=3)])
    assert set(seen) == set(range(10))
