"""What a stranger's checkpoint, data or results may hold: it runs nothing, fills no memory, and is printed as text."""

import gzip
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image

import dualout
from dualout import Calibration, InputError, samplers, schedules
from dualout.card import render
from dualout.cli import _study, console
from dualout.cli._collect import collect
from dualout.cli.main import main
from dualout.data import idx, npfiles
from dualout.errors import printable
from dualout.evaluation.stores import stored
from dualout.export import DualOutputPipeline
from dualout.files import ASIDE, read_json, sweep
from dualout.networks import foreign
from dualout.networks.build import build

OBEYED = "\x1b]0;yours\x07\x9b2J\u202e"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    denoiser = dualout.Denoiser(build("tiny:width=8", 1, 8, 3), dualout.Dual(), schedules.Linear())
    denoiser.save_pretrained(path, image={"channels": 1, "size": [8, 8]})
    return path


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported")
    network = UNet2DModel(8, 1, 3, **SMALL)
    denoiser = dualout.Denoiser(network, dualout.Dual(), schedules.Linear())
    DualOutputPipeline.from_denoiser(denoiser).save_pretrained(path)
    return path


SMALL = {
    "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,),
    "layers_per_block": 1, "norm_num_groups": 2,
}  # fmt: skip


def test_terminals_obey_nothing_that_is_printed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert printable("a\tb\nc é") == "a\tb\nc é"
    assert json.loads(printable(json.dumps(OBEYED, ensure_ascii=False))) == OBEYED
    shutil.copytree(run, tmp_path / "it")
    config = json.loads((run / "config.json").read_text())
    config["card"] = {"training": {"data": OBEYED}, "metrics": [{"[/b]": "[red]" + OBEYED}]}
    (tmp_path / "it" / "config.json").write_text(json.dumps(config))
    assert main(["info", str(tmp_path / "it")]) == 0
    assert main(["info", OBEYED]) == 2
    (tmp_path / "it" / "config.json").write_text(json.dumps(config | {"network": None}))
    assert main(["info", str(tmp_path / "it")]) == 0
    console.wrote(OBEYED)
    said = "".join(capsys.readouterr())
    assert not set(OBEYED) & set(said) - set("]0;yours2J")
    assert "[/b]" in said
    assert "[red]" in said


def test_only_png_is_read_for_png(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # for EPS, Pillow starts a program
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    Image.new("L", (8, 8)).save(tmp_path / "000000.png", "EPS")
    with pytest.raises(InputError, match="damaged"):
        stored(tmp_path, 1)


def test_a_card_is_one_row_a_line() -> None:
    config = {"parameterization": {"name": "eps"}, "schedule": {"name": "linear"}, "network": {"class": "x"}}
    rows = {"title": "t\n---\nlicense: mit", "training": {"a\n|b": "c\n# d"}, "metrics": [{"x|y\nz": "1\n|2"}]}
    lines = render(config | {"card": rows}).splitlines()
    assert lines.count("---") == 2
    assert "| a /b | c # d |" in lines
    assert "| x/y z |" in lines
    assert "| 1 /2 |" in lines


@pytest.mark.parametrize("where", ["unet/other.py", "unet/diffusers.py", "pipeline.py"])
def test_code_beside_a_pipeline_is_not_run(where: str, exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "it"
    shutil.copytree(exported, path)
    assert DualOutputPipeline.from_pretrained(path).denoiser
    (path / where).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom diffusers import UNet2DModel\n")
    index = json.loads((path / "model_index.json").read_text())
    index |= {
        "pipeline.py": {"_class_name": ["pipeline", "X"]},
        "unet/other.py": {"unet": ["other", "UNet2DModel"]},
    }.get(where, {})
    (path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="trust_remote_code"):
        DualOutputPipeline.from_pretrained(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("unet/config.json", {"layers_per_block": 10**18}),
        ("unet/config.json", {"block_out_channels": []}),
        ("unet/config.json", {"norm_num_groups": 0}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": None}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": float("inf")}),
        ("scheduler/scheduler_config.json", {"prediction_type": []}),
        ("scheduler/scheduler_config.json", {"beta_schedule": []}),
    ],
)
def test_a_model_of_diffusers_that_is_damaged_is_refused(file: str, changes: dict, tmp_path: Path) -> None:
    UNet2DModel(8, 1, 1, **SMALL).save_pretrained(tmp_path / "unet")
    DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    index = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    foreign.load(tmp_path)
    # what a download left out
    (tmp_path / file).parent.rename(tmp_path / "aside")
    with pytest.raises(InputError, match=r"config\.json is missing \(it holds aside, model_index\.json"):
        foreign.load(tmp_path)
    (tmp_path / "aside").rename((tmp_path / file).parent)
    (tmp_path / file).write_text(json.dumps(json.loads((tmp_path / file).read_text()) | changes))
    with pytest.raises(InputError):
        foreign.load(tmp_path)


def test_a_file_of_weights_that_holds_itself_ends(tmp_path: Path) -> None:
    content: dict = {}
    content["model"] = content
    torch.save(content, tmp_path / "it.pt")
    with pytest.raises(InputError, match="no weights at its top"):
        foreign.load(tmp_path / "it.pt", "plain:network=small:size=8")


@pytest.mark.parametrize(
    "changes",
    [{"times": [float("inf")] * 3}, {"values": {"x0_scale": [10**400] * 3}}, {"sampler": "ddim"}, {"protocol": [1]}],
)
def test_a_calibration_that_is_damaged_is_told(changes: dict, tmp_path: Path) -> None:
    sampler = samplers.DDIM(3).config()
    path = Calibration(sampler, (999, 600, 200), {"x0_scale": [1.0] * 3}).save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match="is damaged"):
        Calibration.load(tmp_path, sampler)


def test_numbers_that_no_float_holds_are_no_betas() -> None:
    with pytest.raises(InputError, match="betas"):
        schedules.FromBetas([10**400])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_nobody_waits_for_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / ".config.json.abcdefgh.tmp"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="no regular file"):
        read_json(pipe)
    sweep(tmp_path)
    assert pipe.exists()


def test_what_a_link_leads_to_is_not_swept(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{ASIDE}x").symlink_to(tmp_path / "mine")
    (tmp_path / "out" / ".file.abcdefgh.tmp").symlink_to(tmp_path / "mine" / "file")
    sweep(tmp_path / "out")
    assert (tmp_path / "mine" / "file").exists()


def test_json_that_fills_the_memory_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(InputError, match="2048 MiB"):
        read_json(tmp_path / "config.json")


def test_archives_that_fill_the_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npfiles, "memory", lambda: 2**16)
    monkeypatch.setattr(idx, "memory", lambda: 2**16)
    np.savez_compressed(tmp_path / _study.ARRAYS, a=np.zeros(2**17, np.uint8))
    (tmp_path / _study.DOCUMENT).write_text("{}")
    with pytest.raises(InputError, match="in memory"):
        _study.read(tmp_path)
    shape = struct.pack(">BBBBIII", 0, 0, 8, 3, 2, 256, 256)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(shape + bytes(2**17)))
    with pytest.raises(InputError, match="this machine has"):
        dualout.data.load(f"idx:{tmp_path}")


def test_aliases_of_yaml_do_not_multiply(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["network:", "  a0: &a0 [x]", *(f"  a{k}: &a{k} [{', '.join(9 * [f'*a{k - 1}'])}]" for k in range(1, 9))]
    (tmp_path / "train.yaml").write_text("\n".join(lines))
    for config in (["--config", str(tmp_path / "train.yaml")], [f"--config={tmp_path / 'train.yaml'}"]):
        assert main(["train", *config, "--dry_run"]) == 2
        assert "values, more than" in capsys.readouterr().err
    (tmp_path / "deep.yaml").write_text(f"network: {'[' * 2000}{']' * 2000}")
    assert main(["train", "--config", str(tmp_path / "deep.yaml")]) == 2
    with pytest.raises(InputError) as error:
        dualout.Parameterization.parse("karras:sigma_data=[[&a [1], *a]]")
    assert "&a" in str(error.value)


ROW = {"parameterization": "eps", "sampler": "ddim", "spacing": "trailing", "steps": 5, "fd": 1.0, "images": 9}


@pytest.mark.parametrize(
    "changes",
    [{"steps": None}, {"steps": 10**400}, {"fd": 10**400}, {"fd": "1"}, {"images": "9"}, {"run": []}, {"sampler": {}}],
)
def test_scores_that_are_none_are_told(changes: dict, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps([ROW, ROW | {"steps": 9} | changes]))
    with pytest.raises(InputError, match=f"damaged: {next(iter(changes))} is"):
        collect([str(tmp_path)])


def test_names_are_text_on_the_page(tmp_path: Path) -> None:
    name = r"$\frac{$<script>alert(1)</script>"
    rows = [ROW | {"steps": k, "parameterization": p, "sampler": name, "fd": fd}
            for k, fd in ((5, 1.0), (9, float("nan"))) for p in (name, "eps")]  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(rows))
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 2
