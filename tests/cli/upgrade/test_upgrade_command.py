"""dualout upgrade, as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import dualout
from dualout.cli.main import main
from dualout.errors import InputError
from dualout.samplers import DDIM
from dualout.training import opening, readout
from dualout.training.upgrade_config import UpgradeConfig
from dualout.training.upgrade_run import Upgrade
from upgrade_calls import digest, first_of, upgraded


def first(path: Path, **options) -> torch.Tensor:
    return DDIM(steps=5, **options).sample(dualout.Denoiser.from_pretrained(path), dualout.noise(range(4), (1, 8, 8)))


def test_the_closed_form_leaves_a_better_checkpoint_and_the_source_alone(source, closed, tmp_path, capsys) -> None:
    before = digest(source)
    out = tmp_path / "again"
    assert upgraded(source, out=out) == 0
    said = capsys.readouterr()
    assert digest(source) == before
    assert "closed form" in said.err
    assert f"wrote {out}" in said.out
    assert "ratio" in said.out
    record = json.loads((out / "upgrade.json").read_text())
    assert [c["stage"] for c in record["checks"]] == ["original", "closed form"]
    assert record["checks"][1]["kept"]
    assert record["checks"][1]["score"] < 0
    for row in record["table"]:
        assert row["after"] <= row["before"]
        assert row["open"] == (row["ratio"] > 0)
    # the same command makes the same weights
    assert (out / "model.safetensors").read_bytes() == (closed / "model.safetensors").read_bytes()
    old, new = (dualout.Denoiser.from_pretrained(p) for p in (source, out))
    assert new.parameterization.spec == "upgraded:ratio=pixel"
    x, t = dualout.noise(range(4), (1, 8, 8)), torch.tensor([1, 300, 600, 999])
    assert torch.equal(new(x, t).parts["eps"], old(x, t).parts["eps"])
    assert torch.equal(first_of(new.route("eps")), first(source))


def test_other_commands_take_it(closed, tmp_path, capsys) -> None:
    assert main(["sample", str(closed), "--images", "4", "--steps", "3", "--out", str(tmp_path / "images")]) == 0
    assert len(list((tmp_path / "images").glob("0*.png"))) == 4
    assert main(["info", str(closed)]) == 0
    init = ["--init", str(closed), "--steps", "1", "--batch_size", "4", "--sample_every", "0", "--precision", "fp32"]
    assert main(["train", *init, "--out", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert {"loss/eps", "loss/x0", "loss/mu"} <= metrics.keys()


def test_an_upgrade_that_is_finished_is_not_made_again(source, closed, capsys) -> None:
    before = digest(closed)
    assert upgraded(source, out=closed) == 0
    assert "has all of it" in capsys.readouterr().err
    assert digest(closed) == before
    assert upgraded(source, "--seed", 1, out=closed) == 2
    assert "other settings: seed 0 → 1" in capsys.readouterr().err


def test_only_the_new_rows_are_trained_and_a_longer_one_goes_on(source, tmp_path, capsys) -> None:
    out = tmp_path / "rows"
    rows = ["--scope", "rows", "--check_every", 2]
    assert upgraded(source, *rows, "--steps", 2, out=out) == 0
    assert upgraded(source, *rows, "--steps", 4, out=out) == 0
    checks = json.loads((out / "upgrade.json").read_text())["checks"]
    assert [(c["stage"], c["step"]) for c in checks] == [
        ("original", 0), ("closed form", 0), ("fine-tuned", 2), ("fine-tuned", 4)
    ]  # fmt: skip
    straight = tmp_path / "straight"
    assert upgraded(source, *rows, "--steps", 4, out=straight) == 0
    old = dualout.Denoiser.from_pretrained(source)
    one, other = (dualout.Denoiser.from_pretrained(p / "training") for p in (out, straight))
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
        before = old.state_dict()[name]
        if not name.startswith("network.conv_out"):
            assert torch.equal(value, before), name
        else:
            assert torch.equal(value[:1], before)
    fitted = dualout.Denoiser.from_pretrained(out)
    assert fitted.parameterization.spec.startswith("upgraded")
    # what is in the directory is never worse than the original
    table = json.loads((out / "upgrade.json").read_text())["table"]
    assert all(row["after"] <= row["before"] for row in table)


def test_images_that_have_moved_are_known_again(source, tmp_path, capsys) -> None:
    images, out = np.random.default_rng(0).integers(0, 255, (80, 8, 8), dtype=np.uint8), tmp_path / "out"
    for name, content in (("here", images), ("there", images), ("other", images[::-1])):
        np.save(tmp_path / f"{name}.npy", content)

    def rows(name: str, steps: int) -> int:
        data = f"arrays:{tmp_path / name}.npy"
        return upgraded(source, "--scope", "rows", "--check_every", 2, "--steps", steps, "--data", data, out=out)

    assert rows("here", 2) == 0
    assert rows("other", 4) == 2
    assert "other.npy, fingerprint" in capsys.readouterr().err
    assert rows("there", 4) == 0
    record = json.loads((out / "upgrade.json").read_text())
    assert [c["step"] for c in record["checks"]] == [0, 0, 2, 4]
    assert record["config"]["data"].endswith("there.npy")
    # an earlier version did not say which images they were
    del record["data"]
    (out / "upgrade.json").write_text(json.dumps(record))
    assert rows("here", 4) == 2
    assert "other settings: data arrays:" in capsys.readouterr().err


def test_a_source_that_has_moved_is_known_again(source, tmp_path, capsys) -> None:
    out, moved, other = tmp_path / "out", tmp_path / "moved", tmp_path / "other"

    def rows(of: Path, steps: int) -> int:
        return upgraded(of, "--scope", "rows", "--check_every", 2, "--steps", steps, out=out)

    assert rows(source, 2) == 0
    shutil.copytree(source, moved)
    denoiser = dualout.Denoiser.from_pretrained(source)
    denoiser.network.conv_out.bias.data += 1e-3
    denoiser.save_pretrained(other, image={"channels": 1, "size": [8, 8]})
    assert rows(other, 4) == 2
    assert f"began with another source: {other} has other weights than {source}" in capsys.readouterr().err
    assert rows(moved, 4) == 0
    record = json.loads((out / "upgrade.json").read_text())
    assert [c["step"] for c in record["checks"]] == [0, 0, 2, 4]
    assert record["config"]["source"] == str(moved)
    # what came to lie in its place is another source too
    shutil.copy(other / "model.safetensors", moved)
    assert rows(moved, 6) == 2
    assert f"the weights of {moved} have changed" in capsys.readouterr().err
    # an earlier version did not say which source it was
    del record["source"]
    (out / "upgrade.json").write_text(json.dumps(record))
    assert rows(source, 6) == 2
    assert "other settings: source " in capsys.readouterr().err


def test_what_a_killed_upgrade_was_writing_is_removed_and_two_at_once_are_refused(source, tmp_path) -> None:
    torn = tmp_path / "out" / ".model.safetensors.a1b2c3_4.tmp"
    torn.parent.mkdir()
    torn.write_bytes(b"half")
    config = UpgradeConfig(
        source=str(source), data="digits", out=str(torn.parent), bins=2, held_out=16, images=64, device="cpu"
    )
    with Upgrade(config) as first, Upgrade(config) as second:
        checks = iter(first)
        assert next(checks).stage == "original"
        assert not torn.exists()
        with pytest.raises(InputError, match="another process is upgrading in --out"):
            next(iter(second))
        assert [check.stage for check in checks] == ["closed form"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_least_squares_and_the_same_command_makes_them(
    source, tmp_path, capsys, monkeypatch, number, code
) -> None:
    def sending(*arguments, **options):
        os.kill(os.getpid(), number)
        return collect(*arguments, **options)

    collect = readout.collect
    with monkeypatch.context() as patched:
        patched.setattr(readout, "collect", sending)
        assert upgraded(source, out=tmp_path / "out") == code
    assert "stopped: the same command begins this stage again" in capsys.readouterr().err
    assert upgraded(source, out=tmp_path / "out") == 0
    stages = [check["stage"] for check in json.loads((tmp_path / "out" / "upgrade.json").read_text())["checks"]]
    assert stages == ["original", "closed form"]


@pytest.mark.parametrize("scope", ["last", "all"])
def test_what_is_worse_is_not_kept(source, tmp_path, scope) -> None:
    out = tmp_path / "run"
    # a learning rate that ruins everything
    assert upgraded(source, "--scope", scope, "--steps", 3, "--lr", 9, "--warmup", 0, "--start", "zero", out=out) == 0
    checks = json.loads((out / "upgrade.json").read_text())["checks"]
    assert [c["kept"] for c in checks] == [True, False]
    assert checks[1]["worse"]
    assert torch.equal(first(out), first(source))
    assert dualout.Denoiser.from_pretrained(out).parameterization.spec == "upgraded"


def measured(*errors):
    """Errors of one look after the other, in the first part of t and in the others; the new route is no help."""
    looks = iter(errors)

    def measure(denoiser, batches, bins):
        first, others = next(looks)
        eps = torch.tensor([first] + [others] * (bins - 1), dtype=torch.float64)[:, None].repeat(1, 16)
        return opening.Errors(eps, torch.zeros_like(eps), torch.ones_like(eps))

    return measure


@pytest.mark.parametrize(("tolerance", "kept"), [(0, [True, False]), (0.02, [True, True])])
def test_a_little_more_error_at_one_noise_level_is_tolerated_for_less_on_the_whole(
    source, tmp_path, monkeypatch, tolerance, kept
) -> None:
    # after the original, a hundredth more in the first part of t, half in the others
    monkeypatch.setattr(opening, "measure", measured((1, 1), (1.01, 0.5)))
    out = tmp_path / "run"
    told = ["--scope", "all", "--steps", 2, "--start", "zero", "--tolerance", tolerance]
    assert upgraded(source, *told, out=out) == 0
    checks = json.loads((out / "upgrade.json").read_text())["checks"]
    assert [c["kept"] for c in checks] == kept
    assert checks[-1]["worse"] == ([] if tolerance else [0])


def test_refused_weights_leave_what_was_best_before_and_are_told_of(source, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(opening, "measure", measured((1, 1), (1, 0.9), (1, 0.8), (1.1, 0.5)))
    out = tmp_path / "run"
    assert upgraded(source, "--scope", "all", "--steps", 4, "--check_every", 2, out=out) == 0
    checks = json.loads((out / "upgrade.json").read_text())["checks"]
    assert [c["kept"] for c in checks] == [True, True, True, False]
    assert "err more at some t than --tolerance allows: the best before them were written" in capsys.readouterr().err
    card = json.loads((out / "config.json").read_text())["card"]["training"]
    assert (card["stage"], card["step"]) == ("fine-tuned", 2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--scope", "rwos"], "did you mean 'rows'?"),
        (["--start", "zero"], "leaves nothing to do"),
        (["--adapter", "plain"], "--adapter is for files of weights"),
        (["--schedule", "cosine"], "leave out --schedule cosine"),
        (["--held_out", "2"], "--held_out is 16 or more"),
        (["--tolerance", "1"], "--tolerance is a share from 0 to below 1, such as 0.01; got 1"),
        (["--bins", "2000"], "more than the 1000 noise levels"),
        (["--layer", "conv_uot"], "no convolution and no linear layer|has no convolution or linear layer"),
        (["--data", "digits:size=12"], "makes images of 8×8, the data are 12×12; --size 8 makes them fit"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(source, tmp_path, capsys, arguments, says) -> None:
    import re

    assert upgraded(source, *arguments, out=tmp_path / "out") == 2
    assert re.search(re.escape(says).replace(r"\|", "|"), capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_directory_of_something_else_and_a_dual_model_are_refused(source, closed, tmp_path, capsys) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert upgraded(source, out=tmp_path) == 2
    assert "holds something else (thesis.tex)" in capsys.readouterr().err
    assert upgraded(closed, out=tmp_path / "out") == 2
    assert "two outputs already" in capsys.readouterr().err


def test_few_images_are_refused(source, tmp_path, capsys) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((40, 8, 8), np.uint8))
    assert upgraded(source, "--data", f"arrays:{tmp_path / 'x.npz'}", out=tmp_path / "out") == 2
    assert "needs 64 images or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--adapter", "plain"], "--adapter is for --format dualout"),
        (["--format", "onnx", "--schedule", "linear"], "--schedule is for --format dualout"),
        (["--format", "onnx", "--steps", "5"], "leave out --steps, or say whose calibration"),
        (["--format", "dualout", "--route", "eps"], "leave out --route and --calibrated"),
        (["--format", "dualout", "--adapter", "plain"], "is no file"),
    ],
)
def test_what_is_told_of_a_source_is_told_where_it_is_read(source, tmp_path, arguments, says, capsys) -> None:
    assert main(["export", str(source), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_it_learns_from_what_the_source_was_trained_on(source, tmp_path) -> None:
    other = tmp_path / "other"
    shutil.copytree(source, other)
    config = json.loads((other / "config.json").read_text())
    config["data"]["name"] = f"arrays:path={tmp_path / 'mine.npy'}"
    (other / "config.json").write_text(json.dumps(config))
    np.save(tmp_path / "mine.npy", np.random.default_rng(0).integers(0, 256, (80, 8, 8), dtype=np.uint8))
    with Upgrade(UpgradeConfig(source=str(other), out=str(tmp_path / "out"), device="cpu")) as work:
        assert (work.config.data, len(work.dataset)) == (config["data"]["name"], 80)
    with Upgrade(UpgradeConfig(source=str(other), data="digits", out=str(tmp_path / "out"), device="cpu")) as work:
        assert work.dataset.name == "digits"
    del config["data"]
    (other / "config.json").write_text(json.dumps(config))
    with (
        pytest.raises(InputError, match="does not say what it was trained on: give --data"),
        Upgrade(UpgradeConfig(source=str(other), out=str(tmp_path / "out"), device="cpu")),
    ):
        pass


def test_a_dry_run_tells_and_writes_nothing(source, tmp_path, capsys) -> None:
    assert upgraded(source, "--scope", "last", "--steps", 30, "--dry_run", out=tmp_path / "out") == 0
    told = capsys.readouterr().out
    assert "scope: last" in told
    assert "# work       128 images in the least squares, 30 steps of 8, 32 images held out" in told
    assert not (tmp_path / "out").exists()


def test_one_that_is_killed_while_its_first_checkpoint_is_written_goes_on(source, tmp_path, monkeypatch) -> None:
    from dualout.training.upgrade_run import Upgrade

    def killed(*_: object) -> None:
        (tmp_path / "out" / ".model.safetensors.a1b2c3_4.tmp").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Upgrade, "_write", killed)
        assert upgraded(source, out=tmp_path / "out") == 130
    assert upgraded(source, out=tmp_path / "out") == 0
    assert (tmp_path / "out" / "model.safetensors").exists()
