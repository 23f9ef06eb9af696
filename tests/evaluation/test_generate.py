import dataclasses
import errno
import json
import os
import signal
import struct
import threading
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import dualout
from dualout.data.pixels import to_uint8
from dualout.errors import InputError
from dualout.evaluation.generate import generate
from dualout.evaluation.output import Latents, Pixels
from dualout.evaluation.sampling import Sampling, build_sampler
from dualout.evaluation.stores import Npz, stored


@pytest.fixture
def sampling(make_model):
    return Sampling(make_model(), build_sampler("ddpm", 4, "trailing"), seed=100)


def images_of(directory):
    return [np.asarray(Image.open(path)) for path in sorted(directory.glob("0*.png"))]


class Killed(BaseException):
    pass


def test_image_i_is_from_seed_plus_i(sampling, tmp_path):
    assert list(generate(sampling, 5, tmp_path, batch_size=2)) == [0, 2, 4, 5]
    denoiser = sampling.model.denoiser
    for i, image in enumerate(images_of(tmp_path)):
        noise, draw = dualout.noise([100 + i], (1, 8, 8)), dualout.SeededDraw([100 + i], (1, 8, 8))
        expected = to_uint8(dualout.samplers.DDPM(steps=4).sample(denoiser, noise, draw))[0, 0]
        assert (image == expected.numpy()).all()


def test_png_and_npz_hold_the_same_whatever_the_batch(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(Npz, "most", 4)
    sampling = Sampling(make_model((3, 8, 6)), build_sampler("ddim", 3))
    list(generate(sampling, 11, tmp_path / "a", batch_size=5))
    list(generate(sampling, 11, tmp_path / "b", store="npz", batch_size=3))
    found = np.load(tmp_path / "b" / "images.npz")["images"]
    assert found.shape == (11, 8, 6, 3)
    assert found.dtype == np.uint8
    assert (found == np.stack(images_of(tmp_path / "a"))).all()
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["images.npz", "protocol.json"]
    for directory in (tmp_path / "a", tmp_path / "b"):
        for count in (2, 99):
            assert torch.equal(stored(directory, count), torch.from_numpy(found[:count]).permute(0, 3, 1, 2))


def test_grey_npz_has_no_channel_axis_and_classes_have_labels(make_model, tmp_path):
    sampling = Sampling(make_model(classes=3), build_sampler("ddim", 2))
    list(generate(sampling, 5, tmp_path, store="npz"))
    found = np.load(tmp_path / "images.npz")
    assert found["images"].shape == (5, 8, 8)
    assert found["labels"].tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("shape", "output", "images"),
    [
        ((1, 8, 8), Pixels(), 512),
        ((3, 512, 512), Pixels(), 85),
        ((4, 512, 512), Latents(), 16),
        ((3, 8192, 8192), Pixels(), 1),
    ],
)
def test_a_shard_is_64_mib_at_most_and_an_image_at_least(shape, output, images, make_model, tmp_path):
    model = dataclasses.replace(make_model(shape), output=output)
    assert Npz(tmp_path, Sampling(model, build_sampler("ddim", 1)), 1000, 7).shard == images


@pytest.mark.parametrize("store", ["png", "npz"])
def test_killed_and_started_again(store, sampling, tmp_path, monkeypatch):
    monkeypatch.setattr(Npz, "most", 4)
    list(generate(sampling, 14, tmp_path / "whole", store=store, batch_size=4))
    out = tmp_path / "out"
    asked = []
    make = type(sampling).images

    def killing(self, indices):
        if len(asked) == 2:
            raise Killed
        asked.append(list(indices))
        return make(self, indices)

    monkeypatch.setattr(Sampling, "images", killing)
    with pytest.raises(Killed):
        list(generate(sampling, 14, out, store=store, batch_size=4))
    written = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted(out.rglob("0*"))}
    assert len(written) == (8 if store == "png" else 2)
    # what SIGKILL leaves of a file that was being written
    (out / ".000008.png.a1b2c3_4.tmp").write_bytes(b"torn")
    (out / ".images.npz.a1b2c3_4.tmp").write_bytes(b"torn")
    os.truncate(next(iter(written)), 60)

    def counting(self, indices):
        asked.append(list(indices))
        return make(self, indices)

    monkeypatch.setattr(Sampling, "images", counting)
    asked.clear()
    steps = list(generate(sampling, 14, out, store=store, batch_size=4))
    # the torn file is made again; nothing else that was there
    made = [i for indices in asked for i in indices]
    assert made == ([0, 8, 9, 10, 11, 12, 13] if store == "png" else [*range(4), *range(8, 14)])
    assert steps[0] == 14 - len(made)
    assert steps[-1] == 14
    for path, state in list(written.items())[1:]:
        assert store == "npz" or (path.stat().st_ino, path.stat().st_mtime_ns) == state
    assert torch.equal(stored(out, 14), stored(tmp_path / "whole", 14))
    assert not list(out.rglob(".*"))
    # once more: there is nothing left to do
    asked.clear()
    assert list(generate(sampling, 14, out, store=store, batch_size=4)) == [14]
    assert asked == []
    if store == "npz":
        # killed with its shards put together, and one of them not yet removed
        (out / "shards").mkdir()
        np.save(out / "shards" / "00000012.npy", np.zeros((2, 8, 8), np.uint8))
        assert list(generate(sampling, 14, out, store=store, batch_size=4)) == [14]
        assert sorted(p.name for p in out.iterdir()) == ["images.npz", "protocol.json"]
        assert asked == []


@pytest.mark.parametrize(
    ("images", "part", "counts"),
    [(14, (0, 1), (4, 16)), (14, (0, 2), (4, 8)), (14, (1, 2), (4, 8)), (3, (0, 1), (3, 4))],
)
def test_how_much_is_to_be_computed_is_known_before(images, part, counts, sampling, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(Sampling, "prepare", lambda self, *counts: told.append(counts))
    made = generate(sampling, images, tmp_path, batch_size=4, part=part)
    assert [next(made), next(made)] == [0, min(images, 4)]
    # batches of four steps, in one process or in two: for the protocol, and by what is left
    assert told[:2] == [counts] * 2


def test_another_request_is_refused_with_what_differs(sampling, make_model, tmp_path):
    list(generate(sampling, 3, tmp_path))
    other = Sampling(make_model(), build_sampler("ddpm:variance=small", 5, "trailing"), seed=100)
    with pytest.raises(InputError) as caught:
        list(generate(other, 3, tmp_path))
    assert "sampler.variance was large, now small" in str(caught.value)
    assert "steps was 4, now 5" in str(caught.value)
    with pytest.raises(InputError, match="images was 3, now 4"):
        list(generate(sampling, 4, tmp_path))
    assert len(images_of(tmp_path)) == 3
    # versions and devices are written down, but no reason to begin again
    protocol = json.loads((tmp_path / "protocol.json").read_text())
    assert protocol["computed_by"] == {"backend": "eager", "steps": "eager"}
    (tmp_path / "protocol.json").write_text(json.dumps(protocol | {"device": "another"}))
    assert list(generate(sampling, 3, tmp_path)) == [3]


def test_a_directory_with_something_else_is_refused(sampling, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"holds something else \(thesis.txt\)"):
        next(generate(sampling, 3, tmp_path))
    with pytest.raises(InputError, match="is a file"):
        next(generate(sampling, 3, tmp_path / "thesis.txt"))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("store", ["png", "npz"])
def test_a_second_command_into_the_same_directory_is_refused_and_the_first_goes_on(
    store, sampling, tmp_path, monkeypatch
):
    monkeypatch.setattr(Npz, "most", 3)
    list(generate(sampling, 10, tmp_path / "whole", store=store, batch_size=3))
    first = generate(sampling, 10, tmp_path / "out", store=store, batch_size=3)
    assert [next(first), next(first)] == [0, 3]
    with pytest.raises(InputError, match="another process is making images in --out"):
        list(generate(sampling, 10, tmp_path / "out", store=store, batch_size=3))
    assert list(first) == [6, 9, 10]
    assert torch.equal(stored(tmp_path / "whole", 10), stored(tmp_path / "out", 10))
    assert list(generate(sampling, 10, tmp_path / "out", store=store, batch_size=3)) == [10]


@pytest.mark.parametrize("store", ["png", "npz"])
def test_two_processes_share_the_work(store, sampling, tmp_path, monkeypatch):
    monkeypatch.setattr(Npz, "most", 3)
    list(generate(sampling, 10, tmp_path / "one", store=store, batch_size=3))
    first = list(generate(sampling, 10, tmp_path / "two", store=store, batch_size=3, part=(0, 2)))
    second = list(generate(sampling, 10, tmp_path / "two", store=store, batch_size=3, part=(1, 2)))
    assert (first[-1], second[-1]) == (6, 4)
    assert torch.equal(stored(tmp_path / "one", 10), stored(tmp_path / "two", 10))


def test_of_processes_that_end_at_once_one_puts_the_shards_together(sampling, tmp_path, monkeypatch):
    monkeypatch.setattr(Npz, "most", 3)
    list(generate(sampling, 10, tmp_path / "one", store="npz", batch_size=3))
    out, together, other, calls = tmp_path / "two", Npz._put_together, Npz.finish, []
    monkeypatch.setattr(Npz, "finish", lambda place: None)
    for part in (0, 1):
        list(generate(sampling, 10, out, store="npz", batch_size=3, part=(part, 2)))
    monkeypatch.setattr(Npz, "finish", other)
    ends = [Npz(out, sampling, 10, 3).finish for _ in range(2)]

    def waits(*arguments):
        # as long as the other process may need to do all of it and to remove the shards
        calls.append(threading.Thread(target=ends[1]))
        if len(calls) == 1:
            calls[0].start()
            calls[0].join(0.5)
        together(*arguments)

    monkeypatch.setattr(Npz, "_put_together", waits)
    ends[0]()
    calls[0].join()
    assert len(calls) == 1
    assert {p.name for p in out.iterdir()} == {"images.npz", "protocol.json"}
    assert torch.equal(stored(tmp_path / "one", 10), stored(out, 10))


def test_png_holds_grey_or_colour(make_model, tmp_path):
    two, four = (Sampling(make_model((channels, 4, 4)), build_sampler("ddim", 2)) for channels in (2, 4))
    for other, channels in ((two, 2), (four, 4)):
        with pytest.raises(InputError, match=f"{channels} channels: take --format npz"):
            next(generate(other, 3, tmp_path / "a"))
    list(generate(two, 3, tmp_path / "b", store="npz"))
    assert np.load(tmp_path / "b" / "images.npz")["images"].shape == (3, 4, 4, 2)


def test_bad_numbers_are_refused_before_anything_is_written(sampling, tmp_path):
    out = tmp_path / "out"
    for wrong in ({"images": 0}, {"batch_size": 0}, {"store": "jpg"}):
        with pytest.raises(InputError, match=r"whole number|unknown format 'jpg'.*npz, png"):
            next(generate(sampling, **{"images": 3, "out": out} | wrong))
    assert not out.exists()


@pytest.mark.parametrize("made", [True, False])
def test_a_backend_that_cannot_be_used_leaves_nothing_behind(sampling, tmp_path, monkeypatch, made):
    def refused(*_):
        raise InputError("this network cannot be translated")

    monkeypatch.setattr(sampling, "prepare", refused)
    out = tmp_path / "out"
    if made:
        out.mkdir()
    with pytest.raises(InputError, match="cannot be translated"):
        next(generate(sampling, 3, out))
    assert [path.name for path in tmp_path.rglob("*")] == ["out"] * made


@pytest.mark.parametrize(("part", "first"), [((0, 1), 2), ((0, 2), 0), ((1, 2), 0)])
def test_a_request_stays_where_images_are_or_others_make_some(part, first, sampling, tmp_path, monkeypatch):
    make = Sampling.images

    def failing(self, indices):
        if indices[0] >= first:
            raise InputError("not finite")
        return make(self, indices)

    monkeypatch.setattr(Sampling, "images", failing)
    with pytest.raises(InputError, match="not finite"):
        list(generate(sampling, 8, tmp_path, batch_size=2, part=part))
    assert len(images_of(tmp_path)) == first
    monkeypatch.undo()
    other = Sampling(sampling.model, sampling.sampler, seed=7)
    with pytest.raises(InputError, match="seed was 100, now 7"):
        list(generate(other, 8, tmp_path, batch_size=2))


def png_of(width):
    """The beginning of a PNG that says it is so large."""
    kind = b"IHDR" + struct.pack(">IIBBBBB", width, width, 8, 0, 0, 0, 0)
    head = struct.pack(">I", 13) + kind + struct.pack(">I", zlib.crc32(kind))
    return b"\x89PNG\r\n\x1a\n" + head + struct.pack(">I", 2**16) + b"IDAT" + bytes(64)


def test_images_that_are_not_as_they_were_written_are_named(sampling, tmp_path):
    list(generate(sampling, 3, tmp_path, store="npz"))
    archive, pixels = tmp_path / "images.npz", stored(tmp_path, 3).numpy().tobytes()
    archive.write_bytes(archive.read_bytes().replace(pixels, bytes(len(pixels))))
    with pytest.raises(InputError, match=r"images.npz is damaged: .*remove it, and give the same command again"):
        stored(tmp_path, 3)
    archive.unlink()
    # another format behind the name, of which some are programs, or an image that no memory holds
    picture = tmp_path / "000000.png"
    Image.new("L", (8, 8)).save(picture, "bmp")
    for contents in (picture.read_bytes(), png_of(2**15)):
        picture.write_bytes(contents)
        with pytest.raises(InputError, match=r"000000.png is damaged: .*remove it, and give the same command again"):
            stored(tmp_path, 3)


@pytest.mark.parametrize("store", ["png", "npz"])
def test_a_write_that_fails_is_told_with_its_reason_and_done_once_it_can_be(store, make_model, tmp_path):
    resource = pytest.importorskip("resource", reason="this system has no limit on the size of files")
    sampling = Sampling(make_model(shape=(3, 48, 48)), build_sampler("ddim", 1))
    list(generate(sampling, 4, tmp_path / "whole", store=store))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(InputError, match=f"cannot write .*: {os.strerror(errno.EFBIG)}"):
            list(generate(sampling, 4, tmp_path / "out", store=store))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert not list(tmp_path.rglob("*.tmp"))
    list(generate(sampling, 4, tmp_path / "out", store=store))
    assert torch.equal(stored(tmp_path / "out", 4), stored(tmp_path / "whole", 4))
