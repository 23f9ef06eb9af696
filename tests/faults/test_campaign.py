"""A part of benchmarks/campaign, without its processes: whatever is damaged, the answer is right or an InputError."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from campaign import checkpoints, every_step_count, images, mutate
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import dualout
from dualout import data
from dualout.bounded import no_larger_than, no_more_than
from dualout.cli.main import main
from dualout.errors import InputError
from dualout.files import atomically
from dualout.schedules import Linear
from dualout.training.checkpoint import RunDirectory, read_run, states

SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from dualout.networks.build import build

    path = tmp_path_factory.mktemp("model") / "run"
    denoiser = dualout.Denoiser(build("tiny:width=8", 1, 8, 3), dualout.Dual(), Linear())
    denoiser.save_pretrained(path, image={"channels": 1, "size": [8, 8]})
    return path


@pytest.fixture(scope="module")
def spoilt(model, tmp_path_factory):
    """A function that makes a fresh copy to break."""
    place = tmp_path_factory.mktemp("spoilt") / "run"

    def copy():
        shutil.rmtree(place, ignore_errors=True)
        return shutil.copytree(model, place)

    return copy


WAYS = [
    checkpoints.values,
    checkpoints.damaged_text,
    checkpoints.foreign,
    checkpoints.weights,
    checkpoints.tensors,
]


@pytest.mark.parametrize("damage", WAYS, ids=lambda way: way.__name__)
@settings(max_examples=10)
@given(seed=SEEDS)
def test_a_damaged_checkpoint_is_refused_or_a_whole_model(spoilt, damage, seed):
    broken = spoilt()
    damage(random.Random(seed), broken)
    try:
        denoiser = dualout.Denoiser.from_pretrained(broken)
    except InputError:
        return
    assert all(p.isfinite().all() for p in denoiser.parameters())


@pytest.mark.parametrize(
    ("argument", "value", "says"),
    [
        ("layers_per_block", 100_000, "holds far fewer weights"),  # a network of terabytes, told before it is built
        ("time_embedding_type", "none such", "cannot be built"),
    ],
)
def test_a_checkpoint_whose_network_cannot_be_built_is_refused(spoilt, argument, value, says):
    broken = spoilt()
    config = json.loads((broken / "config.json").read_text())
    config["network"]["arguments"][argument] = value
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=says):
        dualout.Denoiser.from_pretrained(broken)


@pytest.mark.parametrize(
    ("key", "value"),
    [("norm_eps", "x"), ("freq_shift", []), ("downsample_padding", 2**31), ("norm_num_groups", 1.0)],
)
def test_what_only_a_call_of_the_network_shows_is_told(spoilt, tmp_path, capsys, key, value):
    broken = spoilt()
    config = json.loads((broken / "config.json").read_text())
    config["network"]["arguments"][key] = value
    (broken / "config.json").write_text(json.dumps(config))
    assert sample(broken, tmp_path / "out") == 2
    assert "cannot look at images" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_images_of_a_size_that_the_network_cannot_halve_are_refused(spoilt, tmp_path, capsys):
    broken = spoilt()
    config = json.loads((broken / "config.json").read_text()) | {"image": {"channels": 1, "size": [7, 8]}}
    (broken / "config.json").write_text(json.dumps(config))
    assert sample(broken, tmp_path / "out") == 2
    assert "cannot look at images of (1, 7, 8) (C, H, W): RuntimeError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "value"),
    [("network", []), ("network", {"class": "diffusers.UNet2DModel", "arguments": 3}), ("network", "x")],
)
def test_a_network_that_is_none_is_told(spoilt, tmp_path, capsys, section, value):
    broken = spoilt()
    config = json.loads((broken / "config.json").read_text()) | {section: value}
    (broken / "config.json").write_text(json.dumps(config | {"image": {"channels": 1, "size": 8}}))
    assert sample(broken, tmp_path / "out") == 2
    assert "a network is written" in capsys.readouterr().err


def test_weights_of_which_one_has_another_precision_are_read_in_that_of_the_network(spoilt, tmp_path):
    broken = spoilt()
    tensors = load_file(broken / "model.safetensors")
    first = next(iter(tensors))
    save_file(tensors | {first: tensors[first].double()}, broken / "model.safetensors")
    assert sample(broken, tmp_path / "one") == 0
    assert {p.dtype for p in dualout.Denoiser.from_pretrained(broken).parameters()} == {torch.float32}
    save_file({k: v.double() for k, v in tensors.items()}, broken / "model.safetensors")
    assert {p.dtype for p in dualout.Denoiser.from_pretrained(broken).parameters()} == {torch.float64}


def test_a_schedule_has_no_more_steps_than_tables_hold():
    with pytest.raises(InputError, match="from 1 to 100000 steps"):
        Linear(steps=10**7)


def test_a_specification_that_is_no_text_is_refused():
    with pytest.raises(InputError, match=r"is written name:option=value, got \['dual'\]"):
        dualout.Dual.parse(["dual"])  # type: ignore[arg-type]


def test_weights_of_eight_bits_are_read_in_the_precision_of_the_network(spoilt):
    broken = spoilt()
    tensors = load_file(broken / "model.safetensors")
    save_file({k: v.to(torch.float8_e4m3fn) for k, v in tensors.items()}, broken / "model.safetensors")
    assert {p.dtype for p in dualout.Denoiser.from_pretrained(broken).parameters()} == {torch.float32}


def test_building_is_counted_in_this_thread_only_and_no_longer(model):
    def build():
        return torch.nn.Linear(10_000, 10_000, device="meta").weight.numel()

    with no_larger_than(model / "model.safetensors"), ThreadPoolExecutor(1) as other:
        assert other.submit(build).result() == 10**8
        with pytest.raises(InputError, match="far fewer"):
            build()
    assert build() == 10**8


@pytest.mark.parametrize(("tensors", "numbers"), [(1, 10**8), (1000, 1)])
def test_twice_as_many_weights_may_be_built_and_not_many_times_as_many(tensors, numbers):
    def build(times):
        torch.nn.ParameterList(torch.empty(numbers, device="meta") for _ in range(times * tensors))

    with no_more_than(numbers * tensors, "this file", tensors=tensors):
        build(2)
    # of many small weights their number is one too many
    with no_more_than(10**9, "this file", tensors=tensors), pytest.raises(InputError, match="this file does not fit"):
        build(100)


def sample(run, out, *more):
    return main(["sample", str(run), "--images", "2", "--steps", "1", "--device", "cpu", "--out", str(out), *more])


def test_images_that_are_not_finite_leave_nothing_behind(spoilt, tmp_path, capsys):
    broken = spoilt()
    tensors = load_file(broken / "model.safetensors")
    save_file({k: v * 1e38 if v.ndim > 1 else v for k, v in tensors.items()}, broken / "model.safetensors")
    assert sample(broken, tmp_path / "out") == 2
    assert "not finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    # a directory that was there stays, empty
    (tmp_path / "mine").mkdir()
    assert sample(broken, tmp_path / "mine") == 2
    assert list((tmp_path / "mine").iterdir()) == []


@pytest.mark.parametrize(
    ("size", "says"),
    [([2**31, 2**31], "up to 16384"), ([True, 8], "up to 16384"), ([16384, 16384], "not enough memory")],
)
def test_images_that_no_memory_holds_are_refused(spoilt, tmp_path, capsys, monkeypatch, size, says):
    def refuse(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr("dualout.evaluation.sampling.noise", refuse)
    broken = spoilt()
    config = json.loads((broken / "config.json").read_text()) | {"image": {"channels": 1, "size": size}}
    (broken / "config.json").write_text(json.dumps(config))
    assert sample(broken, tmp_path / "out") == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_errors_of_the_library_are_not_taken_for_a_lack_of_memory(model, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a mistake in the program")

    monkeypatch.setattr("dualout.evaluation.sampling.noise", fail)
    with pytest.raises(RuntimeError, match="a mistake in the program"):
        sample(model, tmp_path / "out")


def test_a_training_without_a_checkpoint_may_begin_in_another_way(tmp_path, capsys, monkeypatch):
    command = [
        "train", "--network", "tiny:width=4", "--batch_size", "2", "--steps", "1", "--sample_every", "0",
        "--device", "cpu", "--precision", "fp32", "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    loss = dualout.Denoiser.loss

    def infinite(self, *arguments, **conditions):
        found = loss(self, *arguments, **conditions)
        return found._replace(total=found.total * float("inf"))

    with monkeypatch.context() as patched:
        patched.setattr(dualout.Denoiser, "loss", infinite)
        assert main(command) == 2
    assert "There is no checkpoint yet. Lower --lr" in capsys.readouterr().err
    # as the message advises
    assert main([*command, "--lr", "1e-4"]) == 0
    assert [step for step, _ in states(tmp_path / "run")] == [1]
    assert "lr: 0.0001" in (tmp_path / "run" / "train.yaml").read_text()


@settings(max_examples=40)
@given(seed=SEEDS, form=st.sampled_from(images.FORMATS))
def test_a_damaged_picture_is_left_out_by_name_or_read(tmp_path_factory, seed, form):
    folder = tmp_path_factory.mktemp("pictures")
    good = images.encoded(images.picture(), "PNG")
    for i in range(2):
        (folder / f"{i}.png").write_bytes(good)
    (folder / f"odd.{form.lower()}").write_bytes(
        mutate.raw(random.Random(seed), images.encoded(images.picture(), form))
    )
    found = data.load(f"folder:{folder}:size=8:grey=false", strict=1.0)
    assert len(found) + sum("odd" in note for note in found.notes) == 3
    first, second = np.asarray(found.gather(np.array([0, 1])))
    assert (first == second).all()


@pytest.mark.parametrize("name", images.RIGHT)
def test_odd_pictures_are_read_as_they_look(name):
    assert images.shown_right(images.RIGHT[name]) is None


@pytest.mark.parametrize("sampler", [*every_step_count.SAMPLERS, every_step_count.OF_DIFFUSERS], ids=lambda s: s.spec)
def test_every_sampler_at_a_few_of_a_thousand_step_counts(sampler):
    denoiser = every_step_count.Gaussian(Linear())
    x = torch.randn(1, 1, 1, every_step_count.PIXELS, dtype=torch.float64)
    for steps in (1, 2, 3, 7, 48, 333, 999, 1000) if sampler.name != "diffusers" else (1, 3, 48):
        assert every_step_count.faults(dataclasses.replace(sampler, steps=steps), denoiser, x) == []


def test_a_sampler_that_is_wrong_is_noticed():
    # a step too few at the end, and eps that is a hundredth off
    class Off(every_step_count.Gaussian):
        def __call__(self, x_t, t, **conditions):
            p = super().__call__(x_t, t)
            return dataclasses.replace(p, x0=p.x0 + 0.02)

    x = torch.randn(1, 1, 1, every_step_count.PIXELS, dtype=torch.float64)
    assert every_step_count.faults(dualout.samplers.DDIM(steps=1000, clip=None), Off(Linear()), x)


@pytest.mark.parametrize("writes", [0, 1])
def test_a_training_killed_as_it_writes_what_it_is_begins_again(tmp_path, monkeypatch, writes):
    class Killed(BaseException):
        pass

    done = []

    def killing(path):
        if len(done) == writes:
            raise Killed
        done.append(path)
        return atomically(path)

    directory = RunDirectory(tmp_path)
    with monkeypatch.context() as patched:
        # what every file is written by
        patched.setattr("dualout.files.atomically", killing)
        with pytest.raises(Killed):
            directory.describe(WHAT, "steps: 1\n")
    directory.close()
    for torn in (tmp_path / ".train.yaml.a1b2c3_4.tmp", tmp_path / "state" / ".run.json.a1b2c3_4.tmp"):
        torn.write_text("st")
    if not writes:
        (tmp_path / ".train.yaml.a1b2c3_4.tmp").unlink()
    again = RunDirectory(tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))
    again.describe(WHAT, "steps: 1\n")
    again.close()
    assert read_run(tmp_path) == WHAT
    assert (tmp_path / "train.yaml").read_text() == "steps: 1\n"


WHAT = {"config": {"steps": 1}, "precision": "fp32", "denoiser": {}, "data": {}}
