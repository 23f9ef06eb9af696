import json

import numpy as np
import pytest
from PIL import Image

import dualout
from dualout.cli.main import main
from dualout.data.pixels import to_uint8
from dualout.evaluation.stores import Npz
from dualout.files import holding
from dualout.networks.build import build

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from diffusers import UNet2DModel

    path = tmp_path_factory.mktemp("runs") / "dual"
    network = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=3, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, num_class_embeds=4,
    )  # fmt: skip
    denoiser = dualout.Denoiser(network, dualout.Dual(), dualout.schedules.Linear(steps=100))
    conditions = {"class_labels": {"classes": ["zero", "one", "two"], "null": 3}}
    denoiser.save_pretrained(path, image={"channels": 1, "size": [8, 8]}, conditions=conditions)
    return path


def test_pngs_grid_and_protocol(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["sample", str(checkpoint), "--images", "10", "--steps", "3", "--seed", "5", "--out", str(out)]
    command += ["--device", "cpu", "--batch_size", "4", "--class_label", "two"]
    assert main(command) == 0
    assert len(sorted(out.glob("[0-9]*.png"))) == 10
    assert np.asarray(Image.open(out / "000009.png")).shape == (8, 8)
    # 10 images in rows of 4, each pixel 8 × 8, a pixel between
    assert Image.open(out / "grid.png").size == (8 * (4 * 9 - 1), 8 * (3 * 9 - 1))
    protocol = json.loads((out / "protocol.json").read_text())
    told = [protocol[k] for k in ("images", "seed", "steps", "nfe", "spacing", "route", "class_labels", "precision")]
    assert told == [10, 5, 3, 3, "trailing", "mix", [2], "fp32"]
    assert protocol["model"]["parameterization"]["name"] == "dual"
    assert protocol["model"]["name"] == "dual"
    assert len(protocol["model"]["sha256"]) == 64
    # image 9 is what the library makes from seed 5 + 9
    import torch

    sampler = dualout.samplers.DDIM(steps=3)
    denoiser = dualout.Denoiser.from_pretrained(checkpoint)
    x = sampler.sample(denoiser, dualout.noise([14], SHAPE), class_labels=torch.tensor([2]))
    made = np.asarray(Image.open(out / "000009.png")).astype(int)
    assert np.abs(made - to_uint8(x)[0, 0].numpy()).max() <= 1
    printed = capsys.readouterr().out
    assert f"wrote {out}" in printed
    assert "grid.png" in printed
    # the same again makes nothing anew
    before = (out / "000003.png").stat().st_mtime_ns
    assert main(command) == 0
    assert "10 images are there already" in capsys.readouterr().err
    assert (out / "000003.png").stat().st_mtime_ns == before


def test_npz(checkpoint, tmp_path):
    out = tmp_path / "out"
    command = ["sample", str(checkpoint), "--images", "7", "--steps", "2", "--format", "npz", "--out", str(out)]
    assert main([*command, "--sampler", "ddpm:variance=small", "--route", "0.5", "--clip", "false"]) == 0
    found = np.load(out / "images.npz")
    assert found["images"].shape == (7, 8, 8)
    assert found["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert (out / "grid.png").exists()
    protocol = json.loads((out / "protocol.json").read_text())
    assert (protocol["sampler"]["clip"], protocol["route"]) == (None, 0.5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sampler", "ddimm"], "did you mean 'ddim'?"),
        (["--spacing", "trail"], "did you mean 'trailing'?"),
        (["--steps", "0"], "1 or more; got 0"),
        (["--steps", "101"], "from 1 to 100"),
        (["--route", "x1"], "did you mean 'x0'?"),
        (["--route", "1.5"], "1.5"),
        (["--format", "jpeg"], "did you mean 'png'?"),
        (["--images", "0"], "--images is a whole number"),
        (["--images", "many"], "images"),
        (["--class_label", "tow"], "unknown class 'tow'; did you mean 'two'?"),
        (["--class_label", "5"], "0 to 2, and 3 for none"),
        (["--device", "tpu9"], "--device 'tpu9' cannot be used here"),
        (["--imges", "3"], "did you mean '--images'?"),
        (["--precision", "fp8"], "unknown precision 'fp8'"),
    ],
)
def test_bad_input_is_one_message_and_nothing_written(checkpoint, tmp_path, capsys, flags, message):
    out = tmp_path / "out"
    assert main(["sample", str(checkpoint), "--out", str(out), *flags]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert not out.exists()


def test_checkpoints_that_are_not_whole(checkpoint, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    assert main(["sample", str(broken), "--out", str(tmp_path / "out")]) == 2
    assert "missing model.safetensors" in capsys.readouterr().err
    assert main(["sample", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "no checkpoint directory" in capsys.readouterr().err


def test_a_directory_with_something_else(checkpoint, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["sample", str(checkpoint), "--images", "2", "--steps", "2", "--out", str(tmp_path)]) == 2
    assert "holds something else (notes.txt)" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_another_backend_makes_the_same_images_and_is_written_down(checkpoint, tmp_path, capsys):
    command = ["sample", str(checkpoint), "--images", "5", "--steps", "3", "--device", "cpu", "--batch_size", "4"]
    eager, other = tmp_path / "eager", tmp_path / "onnx"
    assert main([*command, "--out", str(eager)]) == 0
    assert main([*command, "--out", str(other), "--backend", "onnx"]) == 0
    for name in ("000000.png", "000004.png"):
        one, two = (np.asarray(Image.open(out / name)).astype(int) for out in (eager, other))
        assert np.abs(one - two).max() <= 1
    said = [json.loads((out / "protocol.json").read_text()) for out in (eager, other)]
    assert [p["computed_by"]["backend"] for p in said] == ["eager", "onnx"]
    assert said[1]["computed_by"]["difference"] < said[1]["computed_by"]["tolerance"]
    # auto has nothing to gain from 5 images
    auto = tmp_path / "auto"
    assert main([*command, "--out", str(auto), "--backend", "auto"]) == 0
    chosen = json.loads((auto / "protocol.json").read_text())
    assert (chosen["backend"], chosen["computed_by"]["backend"]) == ("auto", "eager")
    assert (auto / "000004.png").read_bytes() == (eager / "000004.png").read_bytes()
    capsys.readouterr()
    # it goes on with itself, and not with another
    assert main([*command, "--out", str(other), "--backend", "onnx"]) == 0
    assert "5 images are there already" in capsys.readouterr().err
    assert main([*command, "--out", str(other)]) == 2
    assert "backend was onnx, now None" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "new"), "--backend", "openvino", "--precision", "fp16"]) == 2
    assert not (tmp_path / "new").exists()


def test_a_class_whose_name_has_a_comma(tmp_path):
    network = build("tiny:width=8", 1, 8, 3, classes=3)
    conditions = {"class_labels": {"classes": ["cat, small", "cat", "dog"], "null": 3}}
    dualout.Denoiser(network, dualout.Dual(), dualout.schedules.Linear()).save_pretrained(
        tmp_path / "run", image={"channels": 1, "size": [8, 8]}, conditions=conditions
    )
    for text, labels in {"cat, small": [0], "dog,cat, small, 1": [2, 0, 1], "cat,dog": [1, 2]}.items():
        out = tmp_path / text
        command = ["sample", str(tmp_path / "run"), "--images", "3", "--steps", "1", "--class_label", text]
        assert main([*command, "--out", str(out)]) == 0
        assert json.loads((out / "protocol.json").read_text())["class_labels"] == labels


def test_results_that_something_else_damaged(checkpoint, tmp_path, capsys):
    command = ["sample", str(checkpoint), "--images", "3", "--steps", "1", "--out"]
    archive, pictures = tmp_path / "npz", tmp_path / "png"
    for out, form in ((archive, "npz"), (pictures, "png")):
        assert main([*command, str(out), "--format", form]) == 0
    # an archive that has lost its end is made again
    whole = (archive / "images.npz").read_bytes()
    (archive / "images.npz").write_bytes(whole[: len(whole) // 2])
    assert main([*command, str(archive), "--format", "npz"]) == 0
    assert (archive / "images.npz").read_bytes() == whole
    # a picture that ends as one does and is none is told by its name
    (pictures / "000001.png").write_bytes(b"no picture" + (pictures / "000001.png").read_bytes()[-8:])
    capsys.readouterr()
    assert main([*command, str(pictures)]) == 2
    assert "000001.png is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("store", ["png", "npz"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_several_processes_the_last_draws_the_grid(checkpoint, tmp_path, capsys, monkeypatch, order, store):
    # 10 images in batches of 4: none of the processes makes all that the grid shows
    command = ["sample", str(checkpoint), "--images", "10", "--steps", "2", "--device", "cpu", "--batch_size", "4"]
    command += ["--format", store, "--out"]
    monkeypatch.setattr(Npz, "most", 4)
    assert main([*command, str(tmp_path / "one")]) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in order:
        assert not (tmp_path / "two" / "grid.png").exists()
        capsys.readouterr()
        monkeypatch.setenv("RANK", str(rank))
        assert main([*command, str(tmp_path / "two")]) == 0
    assert "grid.png" in capsys.readouterr().out
    one, two = ((tmp_path / name / "grid.png").read_bytes() for name in ("one", "two"))
    assert one == two
    # and the first, while it is at work, is left to do it
    (tmp_path / "two" / "grid.png").unlink()
    monkeypatch.setenv("RANK", "1")
    with holding(tmp_path / "two"):
        assert main([*command, str(tmp_path / "two")]) == 0
    assert not (tmp_path / "two" / "grid.png").exists()
