"""What the page shows, without the page."""

from __future__ import annotations

import io
import shlex
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from dualout import Calibration, Denoiser, Dual, Epsilon, InputError, samplers, schedules
from dualout.app.studio import ROUTES, Made, Progress, Request, Setting, Studio, archive, command, sheet
from dualout.cli.main import main
from dualout.networks.build import build


def checkpoint(path, parameterization, classes=None):
    torch.manual_seed(0)
    network = build("tiny:width=8", 1, (8, 8), parameterization.channels(1), classes=classes)
    denoiser = Denoiser(network, parameterization, schedules.Linear())
    told = {} if classes is None else {"conditions": {"class_labels": {"classes": list("abc"), "null": 3}}}
    denoiser.save_pretrained(path, image={"channels": 1, "size": [8, 8]}, **told)
    return str(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    dual = checkpoint(directory / "dual", Dual())
    values = {"x0_scale": [1.2, 0.9, 1.1]}
    Calibration(samplers.DDIM(3).config(), samplers.DDIM(3).timesteps(schedules.Linear()), values).save(dual)
    return {
        "dual": dual,
        "eps": checkpoint(directory / "eps", Epsilon()),
        "classes": checkpoint(directory / "classes", Dual(), classes=3),
    }


@pytest.fixture(scope="module")
def studio(runs):
    return Studio(list(runs.values()))


SETTINGS = {
    "plain": {},
    "eta": {"eta": 0.5},
    "solver": {"sampler": "dpmsolver", "spacing": "linspace"},
    "solver with noise": {"sampler": "dpmsolver", "eta": 1.0},
    "no noise to have": {"sampler": "unipc", "eta": 1.0},
    "route": {"route": "x0 only"},
    "fixed": {"route": "fixed r", "ratio": 0.25},
    "calibrated": {"calibrated": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_command_makes_the_images_of_the_page(studio, runs, name, tmp_path):
    setting = Setting(runs["dual"], steps=3, **SETTINGS[name])
    *_, made = studio.make(Request([setting], seed=7, images=5))
    arguments = shlex.split(made.command)
    assert arguments[0] == "dualout"
    out = tmp_path / "out"
    arguments[arguments.index("--out") + 1] = str(out)
    assert main([*arguments[1:], "--batch_size", "2", "--device", "cpu"]) == 0  # where the studio is
    for i, image in enumerate(made.images):
        on_disk = np.asarray(Image.open(out / f"{i:06d}.png")).astype(int)
        assert abs(on_disk - image[..., 0].astype(int)).max() <= 1  # batches of another size round another way


def test_classes_and_guidance_are_in_the_command(studio, runs):
    setting = Setting(runs["classes"], steps=2, guidance=2.0, label="b")
    sampling = studio.sampling(setting, 0)
    assert (sampling.labels, sampling.guidance) == ((1,), 2.0)
    told = command(setting, Request([setting]))
    assert "--class_label b --guidance 2" in told


def test_settings_come_in_turn_from_the_same_noise(studio, runs):
    settings = [Setting(runs["dual"], steps=3), Setting(runs["eps"], steps=2), Setting(runs["dual"], steps=3)]
    items = list(studio.make(Request(settings, images=4, filmed=2)))
    steps = [(i.setting, i.step) for i in items if isinstance(i, Progress)]
    assert steps == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (2, 1), (2, 2), (2, 3)]
    first, single, again = (i for i in items if isinstance(i, Made))
    assert (first.images == again.images).all()
    assert not (first.images == single.images).all()
    assert [len(first.frames), len(single.frames)] == [3, 2]
    torch.testing.assert_close(first.frames[0].x_t, single.frames[0].x_t)
    assert [t for t, _ in first.ratios] == [999, 666, 332]
    assert single.ratio() is None
    assert first.ratio() is not None
    assert first.film() is not None


def test_a_request_that_is_closed_stops_at_its_step(studio, runs, monkeypatch):
    looked = []
    denoiser = studio.models[runs["eps"]].denoiser
    monkeypatch.setattr(denoiser.network, "forward", _counting(denoiser.network.forward, looked))
    going = studio.make(Request([Setting(runs["eps"], steps=50)], images=1))
    next(going)
    next(going)
    going.close()
    assert len(looked) == 2


def _counting(forward, looked):
    def counted(*args, **kwargs):
        looked.append(1)
        return forward(*args, **kwargs)

    return counted


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"route": "x0 only", "run": "eps"}, "one output"),
        ({"calibrated": True, "steps": 4}, "has no calibration"),
        ({"steps": 2000}, "from 1 to 1000"),
        ({"sampler": "ddmi"}, "did you mean 'ddim'"),
        ({"run": "nowhere"}, "unknown model"),
        ({"route": "nothing"}, "unknown route"),
    ],
)
def test_what_cannot_be_done_is_told_before_anything_is_made(studio, runs, changes, told):
    name = changes.pop("run", "dual")
    setting = Setting(runs.get(name, name), **changes)
    with pytest.raises(InputError, match=told):
        next(studio.make(Request([Setting(runs["dual"]), setting])))


@pytest.mark.parametrize("fields", [{"images": 0}, {"images": 1000}, {"images": 4, "filmed": 4}, {"seed": -1}])
def test_requests_have_limits(runs, fields):
    with pytest.raises(InputError):
        Request([Setting(runs["dual"])], **fields)


def test_the_archive_holds_every_image_and_its_command(studio, runs, tmp_path):
    *_, made = studio.make(Request([Setting(runs["dual"], steps=1)], images=3))
    with zipfile.ZipFile(archive([made], tmp_path / "images.zip")) as found:
        assert set(found.namelist()) == {"A/command.txt", "A/grid.png", *(f"A/{i:06d}.png" for i in range(3))}
        image = np.asarray(Image.open(io.BytesIO(found.read("A/000001.png"))))
        assert (image == made.images[1, ..., 0]).all()
        assert found.read("A/command.txt").decode().strip() == made.command


def test_a_sheet_enlarges_small_images():
    images = np.arange(2 * 8 * 8, dtype=np.uint8).reshape(2, 8, 8, 1)
    found = sheet(images)
    assert found.shape == (128, 2 * 128 + 4, 1)
    assert (found[:16, :16] == images[0, 0, 0]).all()


def test_each_model_has_its_own_routes(studio, runs):
    assert studio.routes(runs["dual"]) == list(ROUTES)
    assert studio.routes(runs["eps"]) == ["as trained"]


def test_a_run_that_vanishes_is_not_asked_for_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "runs" / "mine", Dual())
    # named as a repository would be
    studio = Studio(["runs/mine"])
    (tmp_path / "runs" / "mine").rename(tmp_path / "elsewhere")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    assert [type(item) for item in studio.make(Request([Setting("runs/mine", steps=1)], images=1))] == [Progress, Made]
    assert studio.calibrations("runs/mine") == []
    with pytest.raises(InputError, match="no checkpoint directory"):
        next(studio.make(Request([Setting("runs/mine", steps=1, calibrated=True)])))
