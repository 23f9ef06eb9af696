"""Files of weights, of anybody, as sources of dualout upgrade."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import dualout
from dualout.cli.main import main
from dualout.networks import foreign
from dualout.parameterizations import Epsilon
from upgrade_calls import NETWORK, digest, first_of, upgraded


def test_weights_that_do_not_fit_are_listed(unet, tmp_path, capsys) -> None:
    from safetensors.torch import load_file, save_file

    unet.save_pretrained(tmp_path / "unet")
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_extra.weight"] = tensors.pop("conv_in.weight")
    save_file(tensors, file)
    told = ["--parameterization", "eps", "--schedule", "linear"]
    assert upgraded(tmp_path / "unet", *told, out=tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "missing keys: conv_in.weight" in said
    assert "unexpected keys: conv_extra.weight" in said


@pytest.mark.parametrize("before", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_weights_that_were_saved_out_of_a_wrapping(unet, tmp_path, before) -> None:
    torch.save({f"{before}{k}": v for k, v in unet.state_dict().items()}, tmp_path / "weights.pt")
    read = foreign.load(tmp_path / "weights.pt", f"plain:network=({NETWORK}):size=8")
    assert torch.equal(read.network.conv_out.weight, unet.conv_out.weight)


@pytest.mark.parametrize("wrapped", [None, "state_dict", "ema"])
def test_a_file_of_weights(unet, tmp_path, wrapped) -> None:
    state = {f"module.{k}": v for k, v in unet.state_dict().items()}
    file = tmp_path / "weights.pt"
    torch.save(state if wrapped is None else {wrapped: state, "step": 7}, file)
    before = digest(file)
    out = tmp_path / "out"
    assert upgraded(file, "--adapter", f"plain:network=({NETWORK}):size=8", out=out) == 0
    assert digest(file) == before
    read = dualout.Denoiser(unet, Epsilon(), dualout.schedules.Linear())
    assert torch.equal(first_of(dualout.Denoiser.from_pretrained(out).route("eps")), first_of(read))


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_files_that_cannot_be_used(unet, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(unet.state_dict(), "good.pt")
    torch.save({"net": unet.state_dict(), "trap": Trap()}, "trap.pt")
    Path("torn.pt").write_bytes(Path("good.pt").read_bytes()[:3000])
    Path("notes.txt").write_text("x")
    torch.save([1, 2], "list.pt")
    torch.save({"step": 3}, "empty.pt")
    plain = ["--adapter", f"plain:network=({NETWORK}):size=8"]
    cases = [
        ("good.pt", [], "say which with --adapter; there are plain, starter-cnn, mnist-ddpm"),
        ("good.pt", ["--adapter", "plane:size=8"], "did you mean 'plain'?"),
        ("good.pt", ["--adapter", "plain:network=(tiny:width=16):size=8"], "of another shape: "),
        ("good.pt", ["--adapter", "starter-cnn"], "has no table 'alpha_t'"),
        ("good.pt", ["--adapter", "mnist-ddpm"], "has no table 'time_embed.weight'"),
        ("good.pt", [*plain, "--schedule", "cosine"], "leave out --schedule cosine"),
        ("good.pt", [*plain, "--data", "photos"], "images of 1 channels"),
        ("trap.pt", plain, "needs code to be run"),
        ("torn.pt", plain, "is damaged"),
        ("notes.txt", plain, "is no file of weights"),
        ("list.pt", plain, "holds a list, not weights by name"),
        ("empty.pt", plain, "it holds step; say which by entry=NAME"),
        ("nowhere/at/all", [], "there is no file or directory"),
    ]
    for file, arguments, says in cases:
        assert upgraded(file, *arguments, out="out") == 2, (file, arguments)
        assert says in capsys.readouterr().err
        assert not Path("out").exists()
    assert not Path("sprung").exists()


# weights of third parties


def test_the_layouts_of_third_parties_are_found_from_their_weights(tmp_path) -> None:
    from dualout.networks.outside import StarterCNN, TimeUNet

    betas = torch.linspace(1e-4, 0.02, 11)
    starter = StarterCNN(1, (8, 8), (4, 6), kernel=5, frequencies=3)
    state = {f"gt.{k}": v for k, v in starter.state_dict().items()}
    torch.save(state | {"beta_t": betas, "alpha_t": (1 - betas).cumprod(0)}, tmp_path / "a.pth")
    read = foreign.load(tmp_path / "a.pth", "starter-cnn")
    # their own words: z = sqrt(ᾱ)·x + sqrt(1 − ᾱ)·eps for x in [−0.5, 0.5], and time t / T, t counted from 1
    x0, eps = torch.rand(2, 1, 8, 8) * 2 - 1, torch.randn(2, 1, 8, 8)
    signal = (1 - betas).cumprod(0)[4]
    z = signal.sqrt() * x0 / 2 + (1 - signal).sqrt() * eps
    level = read.schedule.scalars(3)
    p = read(level.alpha * x0 + level.sigma * eps, 3)
    torch.testing.assert_close(p.parts["eps"], starter(z, torch.full((2,), 0.4)), rtol=1e-4, atol=1e-5)
    torch.save({f"network.{k}": v for k, v in TimeUNet(50).state_dict().items()}, tmp_path / "b.pt")
    other = foreign.load(tmp_path / "b.pt", "mnist-ddpm")
    assert other.schedule.steps == 50
    assert other(torch.zeros(2, 1, 28, 28), 3).x0.shape == (2, 1, 28, 28)
    other.save_pretrained(tmp_path / "saved")
    again = dualout.Denoiser.from_pretrained(tmp_path / "saved")
    x = torch.randn(1, 1, 28, 28)
    assert torch.equal(again(x, 3).x0, other(x, 3).x0)


def test_a_file_of_somebody_elses_becomes_a_checkpoint_that_commands_read(tmp_path, capsys) -> None:
    from dualout.networks.outside import StarterCNN

    betas = torch.linspace(1e-4, 0.02, 11)
    starter = StarterCNN(1, (8, 6), (4, 6), kernel=5, frequencies=3)
    state = {f"gt.{k}": v for k, v in starter.state_dict().items()}
    torch.save(state | {"beta_t": betas, "alpha_t": (1 - betas).cumprod(0)}, tmp_path / "a.pth")
    out = tmp_path / "original"
    command = ["export", str(tmp_path / "a.pth"), "--format", "dualout", "--out", str(out)]
    assert main([*command, "--adapter", "starter-cnn"]) == 0
    assert json.loads((out / "results.json").read_text())["model"]["image"] == [1, 8, 6]
    x, t = dualout.noise(range(2), (1, 8, 6)), 4
    read = foreign.load(tmp_path / "a.pth", "starter-cnn")
    assert torch.equal(dualout.Denoiser.from_pretrained(out)(x, t).x0, read(x, t).x0)
    assert main(["sample", str(out), "--images", "2", "--steps", "2", "--out", str(tmp_path / "images")]) == 0
    assert len(list((tmp_path / "images").glob("0*.png"))) == 2
    capsys.readouterr()
    assert main(command) == 2
    assert "say which with --adapter" in capsys.readouterr().err
