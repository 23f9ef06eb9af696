"""Runs: resumed bit for bit, and refused where they must be."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from dualout import Denoiser
from dualout.card import decoder_of
from dualout.errors import InputError
from dualout.training import Run, TrainConfig
from dualout.training import checkpoint as files
from dualout.training.setup import first_weights
from runs import config, metrics, same, state, trained


@pytest.mark.parametrize("until", [1, 4, 5, 8])
def test_resumed_is_the_uninterrupted_bit_for_bit(whole, tmp_path, until):
    trained(tmp_path / "run", until)
    with Run(config(tmp_path / "run")) as run:
        # a consumer that leaves after step 4 leaves before its checkpoint
        assert run.started == {1: 0, 4: 0, 5: 4, 8: 4}[until]
        assert [step.index for step in run] == list(range(run.started + 1, 10))
    assert same(whole, tmp_path / "run")
    assert metrics(whole) == metrics(tmp_path / "run")


def test_stop_ends_with_a_checkpoint(whole, tmp_path):
    with Run(config(tmp_path / "run")) as run:
        for step in run:
            if step.index == 3:
                run.stop()
        assert run.learner.step == 3
        assert not run.finished
    assert [s for s, _ in files.states(tmp_path / "run")] == [3]
    trained(tmp_path / "run")
    assert same(whole, tmp_path / "run")
    assert metrics(whole) == metrics(tmp_path / "run")


def test_longer_is_as_if_it_had_been_from_the_start(whole, tmp_path):
    trained(tmp_path / "run", steps=6)
    trained(tmp_path / "run", steps=9)
    assert same(whole, tmp_path / "run")


def test_directory_is_a_checkpoint(whole):
    denoiser = Denoiser.from_pretrained(whole)
    for name, weight in denoiser.state_dict().items():
        assert torch.equal(weight, state(whole)[f"average/{name}"])
    written = json.loads((whole / "config.json").read_text())
    assert written["image"] == {"channels": 1, "size": [8, 8], "latents": False}
    assert written["training"]["step"] == 9
    assert denoiser.card["training"]["images seen"] == 36
    assert TrainConfig.fromdict(files.read_run(whole)["config"]).lr == 1e-3
    assert not any(".tmp" in p.name or p.name.startswith(".step") for p in whole.rglob("*"))


def test_keeps_as_many_states_as_asked(tmp_path):
    trained(tmp_path / "run", checkpoint_every=2, keep=3)
    assert [s for s, _ in files.states(tmp_path / "run")] == [6, 8, 9]


def test_finished_run_has_nothing_to_do(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    with Run(config(tmp_path / "run")) as run:
        assert run.finished
        assert list(run) == []
    with pytest.raises(InputError, match="a run is entered before it trains: with Run"):
        list(Run(config(tmp_path / "run")))


def test_changed_configuration_is_refused_with_old_and_new(whole):
    before = (whole / "state" / "run.json").read_text()
    with (
        pytest.raises(InputError, match=r"lr 0.001 → 0.1, batch|batch_size 4 → 8, lr 0.001 → 0.1"),
        Run(config(whole, lr=0.1, batch_size=8)),
    ):
        pass
    assert (whole / "state" / "run.json").read_text() == before


def test_a_run_of_an_earlier_version_goes_on(whole, tmp_path):
    """Options that parameterizations, schedules and networks have had since are not changes."""
    trained(tmp_path / "run", 5)
    file = tmp_path / "run" / "state" / "run.json"
    run = json.loads(file.read_text())
    del run["denoiser"]["parameterization"]["first"], run["denoiser"]["parameterization"]["second"]
    del run["denoiser"]["schedule"]["beta_end"], run["denoiser"]["network"]["arguments"]["num_train_timesteps"]
    file.write_text(json.dumps(run))
    with Run(config(tmp_path / "run")) as going_on:
        assert [step.index for step in going_on] == list(range(5, 10))
    assert same(whole, tmp_path / "run")
    assert "first" in json.loads(file.read_text())["denoiser"]["parameterization"]


def test_changed_images_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 255, (20, 8, 8), dtype=np.uint8))
    trained(tmp_path / "run", data=f"arrays:{tmp_path / 'x.npy'}", steps=2)
    np.save(tmp_path / "x.npy", np.random.default_rng(1).integers(0, 255, (20, 8, 8), dtype=np.uint8))
    with pytest.raises(InputError, match="other images: fingerprint"):
        trained(tmp_path / "run", data=f"arrays:{tmp_path / 'x.npy'}", steps=4)


def test_images_that_have_moved_are_known_again(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (20, 8, 8), dtype=np.uint8)
    for name in ("here", "there", "copy"):
        np.save(tmp_path / f"{name}.npy", images)
    np.save(tmp_path / "other.npy", images[::-1])
    here, there, copy, other = (f"arrays:{tmp_path / name}.npy" for name in ("here", "there", "copy", "other"))
    trained(tmp_path / "stayed", data=here)
    trained(tmp_path / "run", 5, data=here)
    (tmp_path / "here.npy").unlink()
    with pytest.raises(InputError, match=r"other images: data arrays.* → arrays.*other.npy, fingerprint"):
        trained(tmp_path / "run", data=other)
    # not first that its network would not take them
    with pytest.raises(InputError, match=r"other images: data arrays.* → photos, images 20 → "):
        trained(tmp_path / "run", data="photos")
    trained(tmp_path / "run", data=there)
    assert same(tmp_path / "stayed", tmp_path / "run")
    # a finished one, too, is told where they are now, for those who read them there; its scores stay
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (written["data"]["name"], written["training"]["data"]) == (there.replace(":", ":path="), there)
    written["card"]["metrics"] = [{"fd": 1.5}]
    (tmp_path / "run" / "config.json").write_text(json.dumps(written))
    trained(tmp_path / "run", data=copy)
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["data"]["name"] == copy.replace(":", ":path=")
    assert written["card"]["metrics"] == [{"fd": 1.5}]
    assert yaml.safe_load((tmp_path / "run" / "train.yaml").read_text())["data"] == copy


def test_a_finished_run_remembers_where_its_autoencoder_is_now(tmp_path):
    latents = np.random.default_rng(0).standard_normal((20, 1, 8, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", latents)
    for decode in ("/here/vae", "/there/vae", None):
        trained(tmp_path / "run", data=f"arrays:{tmp_path / 'x.npy'}:latents=true", steps=1, decode=decode)
        written = json.loads((tmp_path / "run" / "config.json").read_text())
        assert decoder_of(written) == (decode or "/there/vae")


def test_loss_that_is_no_number_saves_nothing(tmp_path, monkeypatch):
    real = nn.Conv2d.forward
    calls = {"left": -1}

    def poisoned(self, x):
        y = real(self, x)
        if self.out_channels == 3 and self.training:
            calls["left"] -= 1
            if calls["left"] == 0:
                y = y * float("nan")
        return y

    monkeypatch.setattr(nn.Conv2d, "forward", poisoned)
    calls["left"] = 6
    with pytest.raises(InputError) as caught:
        trained(tmp_path / "run")
    said = str(caught.value)
    assert "not finite at step 6" in said
    assert f"last good checkpoint is that of step 4, in {tmp_path / 'run'}" in said
    assert [s for s, _ in files.states(tmp_path / "run")] == [4]
    assert all(v.isfinite().all() for v in state(tmp_path / "run").values())
    assert metrics(tmp_path / "run")[-1]["step"] == 4


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    with Run(config(tmp_path / "run", grad_clip=0.0)) as run:
        steps = iter(run)
        while next(steps).index < 4:
            pass
        with torch.no_grad():
            run.learner.denoiser.network.conv_in.bias[0] = float("inf")
        with pytest.raises(InputError, match=r"not finite at step 4.*Lower --lr or clip gradients \(--grad_clip 1\)"):
            next(steps)
    assert not files.states(tmp_path / "run")


def test_starts_from_a_checkpoint(whole, tmp_path):
    with Run(config(tmp_path / "run", network=None, init=str(whole), seed=5)) as run:
        for name, weight in run.learner.denoiser.state_dict().items():
            assert torch.equal(weight, state(whole)[f"average/{name}"])
    with pytest.raises(InputError, match="was trained with parameterization dual"):
        trained(tmp_path / "other", network=None, init=str(whole), parameterization="eps")
    with pytest.raises(InputError, match="brings its network"):
        trained(tmp_path / "other", network="tiny:width=16", init=str(whole))
    with pytest.raises(InputError, match="channels"):
        trained(tmp_path / "other", network=None, init=str(whole), data="photos")


def test_a_runs_own_settings_begin_another_from_its_weights(whole, tmp_path):
    with Run(config(tmp_path / "run", init=str(whole), lr=1e-5)) as run:
        for name, weight in run.learner.denoiser.state_dict().items():
            assert torch.equal(weight, state(whole)[f"average/{name}"])


def test_classes_are_asked_of_data_that_have_none(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((20, 8, 8), np.uint8))
    with pytest.raises(InputError, match="--conditional needs classes"):
        trained(tmp_path / "run", data=f"arrays:{tmp_path / 'x.npy'}", conditional=True)


def test_a_network_that_does_not_bear_the_size_is_refused(tmp_path):
    # 9 is halved to 5, which is doubled to 10
    network = {
        "class": "diffusers.UNet2DModel",
        "arguments": {
            "sample_size": 9, "in_channels": 1, "out_channels": 3, "layers_per_block": 1, "norm_num_groups": 4,
            "block_out_channels": [8, 8], "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2,
        },
    }  # fmt: skip
    with pytest.raises(InputError, match=r"this UNet2DModel cannot be called .* of shape \(1, 1, 9, 9\)"):
        trained(tmp_path / "run", network=network, size=9)
    assert not (tmp_path / "run").exists()


def test_a_denoiser_built_elsewhere_goes_on_too(tmp_path):
    def built(seed: int) -> Denoiser:
        usual = TrainConfig(network="tiny:width=8", seed=seed)
        from dualout import data

        return first_weights(usual, data.load("digits"))

    def go(out, until=None, seed=1):
        with Run(config(out, network=None), denoiser=built(seed), about={"from": "elsewhere"}) as run:
            for step in run:
                if step.index == until:
                    break

    go(tmp_path / "a")
    go(tmp_path / "b", until=5)
    # the weights come from the state, not from what is given
    go(tmp_path / "b", seed=2)
    assert same(tmp_path / "a", tmp_path / "b")
    assert Denoiser.from_pretrained(tmp_path / "a").card["training"]["from"] == "elsewhere"
