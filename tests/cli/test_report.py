import json

import numpy as np
import pytest

import dualout
from dualout.analysis import canvas, reading
from dualout.cli._collect import collect
from dualout.cli.main import main
from dualout.networks.build import build


def run_directory(path, spec, seed=0, lr=1e-3):
    """What a training and an evaluation leave."""
    parameterization = dualout.Parameterization.parse(spec)
    network = build("tiny:width=8", 1, 8, parameterization.channels(1))
    training = {"data": "digits", "lr": lr, "seed": seed, "steps": 30}
    dualout.Denoiser(network, parameterization, dualout.schedules.Linear()).save_pretrained(
        path, image={"channels": 1, "size": [8, 8]}, training=training
    )
    lines = [json.dumps({"step": s, "loss": 1 / s, "loss/eps": 1 / s, "seconds": s}) for s in range(10, 40, 10)]
    (path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 40, "lo')
    (path / "samples").mkdir()
    (path / "samples" / "step-000030.png").write_bytes(canvas.png_of(np.zeros((8, 8, 1), np.uint8)))
    factor = 0.5 if spec.startswith("dual") else 1.0
    rows = [
        {"run": str(path), "parameterization": parameterization.spec, "route": "mix", "sampler": "ddim"}
        | {"spacing": "trailing", "steps": k, "seed": 0, "features": "digits", "fd": (factor + seed / 10) * 10 / k}
        | {"images": 100, "nfe": k, "protocol": {"data": "digits", "steps": k}}
        for k in (5, 10)
    ]
    (path / "evaluation").mkdir()
    (path / "evaluation" / "results.json").write_text(json.dumps(rows))
    return path


def test_a_report_of_several_runs(tmp_path, capsys):
    for spec in ("dual", "eps"):
        run_directory(tmp_path / "runs" / spec, spec)
    out = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "runs" / "dual"), str(tmp_path / "runs" / "eps"), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    text = out.read_text()
    assert "dual is better everywhere" in text
    assert "0.50" in text
    assert "data:image/png;base64," in text
    assert "https://" not in text
    # the directory above says the same
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "again.html"), "--title", "T"]) == 0
    again = (tmp_path / "again.html").read_text()
    assert "<h1>T</h1>" in again
    assert again.count("<svg") == text.count("<svg")


def test_rows_are_found_once_and_a_torn_line_is_left_out(tmp_path):
    run_directory(tmp_path / "dual", "dual")
    runs, scores = collect([str(tmp_path), str(tmp_path / "dual")])
    assert [r.name for r in runs] == ["dual"]
    assert len(scores) == 2
    assert [r["step"] for r in runs[0].metrics] == [10, 20, 30]


def test_runs_of_other_seeds_are_one_method_and_other_settings_are_two(tmp_path):
    for seed in (0, 1):
        run_directory(tmp_path / f"s{seed}", "dual", seed=seed)
    _, scores = collect([str(tmp_path)])
    assert {r["parameterization"] for r in scores} == {"dual"}
    run_directory(tmp_path / "s2", "dual", lr=5e-3)
    runs, scores = collect([str(tmp_path)])
    assert {r["parameterization"] for r in scores} == {"dual [s0]", "dual [s1]", "dual [s2]"}
    assert [r.name for r in runs] == ["dual [s0]", "dual [s1]", "dual [s2]"]


def test_scores_of_other_numbers_of_images_are_not_mixed(tmp_path):
    for spec in ("dual", "eps"):
        run = run_directory(tmp_path / "runs" / spec, spec)
        rows = json.loads((run / "evaluation" / "results.json").read_text())
        few = [r | {"images": 50, "fd": 100 / r["fd"]} for r in rows]
        (run / "evaluation" / "results.json").write_text(json.dumps([*few, *rows]))
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    # the verdict is of the larger number, and is turned round by the smaller
    assert "dual is better everywhere" in text.partition("Features: digits, 100 images")[0]
    many, _, few = text.partition("Features: digits, 100 images")[2].partition("Features: digits, 50 images")
    assert "100 images, below 10,000" in many
    assert "dual is worse everywhere" in few


def test_the_methods_of_a_comparison_are_kept(tmp_path):
    run = run_directory(tmp_path / "run", "dual")
    rows = json.loads((run / "evaluation" / "results.json").read_text())
    rows = [
        r | {"method": m, "calibrated": c}
        for r in rows
        for m, c in (("ours", True), ("ours", False), ("theirs", False))
    ]
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "results.json").write_text("[]")
    (tmp_path / "grid" / "table.json").write_text(json.dumps(rows))
    _, scores = collect([str(tmp_path / "grid")])
    assert {reading.method(r) for r in scores} == {"ours", "ours, calibrated", "theirs"}
    assert main(["report", str(tmp_path / "grid"), "--out", str(tmp_path / "page.html")]) == 0
    assert "ours, calibrated" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no directory at 'nowhere'"),
        (["."], "holds nothing to report"),
        ([".", "--out", "report.pdf"], "such as report.html"),
        ([".", "--out", "no/report.html"], "there is no directory no"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_damaged_results_are_named(tmp_path, capsys):
    run = run_directory(tmp_path / "dual", "dual")
    (run / "evaluation" / "results.json").write_text("[{")
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 2
    assert "results.json" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_an_export_beside_the_runs_has_no_scores(tmp_path, capsys):
    run_directory(tmp_path / "dual", "dual")
    for export in (tmp_path / "dual-diffusers", tmp_path / "dual" / "pipeline"):
        export.mkdir()
        (export / "results.json").write_text(json.dumps({"format": "diffusers", "difference": {"x0": 0.0}}))
    _, alone = collect([str(tmp_path / "dual")])
    _, together = collect([str(tmp_path)])
    assert len(alone) == len(together) == 2
    assert main(["report", str(tmp_path / "dual-diffusers"), "--out", str(tmp_path / "page.html")]) == 2
    assert "holds nothing to report" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_small_page_is_told_in_kilobytes(tmp_path, capsys):
    row = {"parameterization": "dual", "sampler": "ddim", "features": "digits", "fd": 1.0, "steps": 5, "images": 100}
    (tmp_path / "results.json").write_text(json.dumps([row]))
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0
    kilobytes = round((tmp_path / "page.html").stat().st_size / 1000)
    assert 0 < kilobytes < 100
    assert f"({kilobytes} kB, nothing else" in capsys.readouterr().out
