"""ONNX graphs against torch: by ONNX Runtime and OpenVINO, in single calls and through samplers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dualout
from dualout import Denoiser, Dual, Epsilon, InputError, Karras, LearnedVariance, samplers
from dualout.calibrated import Calibrated, Calibration
from dualout.export import DualOutputPipeline, OnnxDenoiser, write_onnx
from dualout.export.onnx_runtime import Runtime
from dualout.guidance import ClassifierFree
from dualout.networks import ScaledTime
from dualout.parameterizations import Upgraded
from dualout.schedules import Cosine, Linear, RectifiedFlow, Schedule

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SHAPE = (1, 8, 8)
# float32 in another order of additions, through K = 5 steps
CLOSE = {"rtol": 5e-5, "atol": 5e-5}


class Net(nn.Module):
    """Small, and translated in a second."""

    def __init__(self, channels: int, classes: int | None = None) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, channels, 3, padding=1)
        self.labels = None if classes is None else nn.Embedding(classes, 6)
        self.config = {} if classes is None else {"num_class_embeds": classes}

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        h = self.first(x) + (t / 300).to(x.dtype).view(-1, 1, 1, 1)
        if self.labels is not None:
            h = h + self.labels(class_labels)[:, :, None, None]
        return self.last(torch.tanh(h))


def small(parameterization: Any, schedule: Schedule | None = None, classes: int | None = None) -> Denoiser:
    torch.manual_seed(1)
    denoiser = Denoiser(Net(parameterization.channels(1), classes), parameterization, schedule or Linear()).eval()
    if denoiser.head is not None:
        for tensor in denoiser.head.state_dict().values():
            tensor.normal_()
    return denoiser


def start(count: int = 3) -> Tensor:
    return dualout.noise(range(count), SHAPE)


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Denoiser, Path]:
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=3, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",), attention_head_dim=4,
    )  # fmt: skip
    denoiser = Denoiser(network, Dual(), Linear()).eval()
    directory = tmp_path_factory.mktemp("onnx")
    checked = write_onnx(denoiser, directory, SHAPE)
    assert checked["difference"].keys() == {"x0", "eps", "ratio"}
    assert max(checked["difference"].values()) < 1e-5
    return denoiser, directory


def test_the_graph_alone_is_the_denoiser(unet: tuple[Denoiser, Path]) -> None:
    denoiser, directory = unet
    session = onnxruntime.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape[0]) for i in session.get_inputs()] == [("x_t", "batch"), ("t", "batch")]
    assert {o.shape[0] for o in session.get_outputs()} == {"batch"}
    assert [o.name for o in session.get_outputs()] == ["x0", "eps", "ratio"]
    for count in (1, 2, 70):
        x_t, t = start(count), torch.arange(count) * 999 // max(count - 1, 1)
        x0, eps, ratio = (torch.from_numpy(v) for v in session.run(None, {"x_t": x_t.numpy(), "t": t.numpy()}))
        with torch.no_grad():
            p = denoiser(x_t, t)
        level = denoiser.schedule.level(t).like(x_t)
        assert ((x0 - p.x0).abs() <= 1e-5 * (1 + level.sigma / level.alpha)).all()
        assert ((eps - p.eps).abs() <= 1e-5 * (1 + level.alpha / level.sigma)).all()
        torch.testing.assert_close(ratio, p.parts["ratio"], rtol=1e-5, atol=1e-5)


def test_what_it_is_is_written_inside_and_where_it_was_made_is_not(unet: tuple[Denoiser, Path]) -> None:
    _, directory = unet
    model = onnx.load(directory / "model.onnx")
    onnx.checker.check_model(model)
    (entry,) = [p for p in model.metadata_props if p.key == "dualout"]
    record = json.loads(entry.value)
    assert record["schedule"] == Linear().config()
    assert record["parameterization"] == Dual().config()
    assert record["image"] == {"channels": 1, "size": [8, 8]}
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    written = (directory / "model.onnx").read_bytes()
    assert str(Path(dualout.__file__).parent).encode() not in written
    assert b"site-packages" not in written
    card = (directory / "README.md").read_text()
    assert "library_name: onnx" in card
    assert "OnnxDenoiser" in card


SAMPLERS = [samplers.DDIM(5), samplers.DPMSolver(5), samplers.UniPC(5)]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.spec)
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_one_model_three_ways(unet: tuple[Denoiser, Path], sampler: samplers.Sampler, runtime: str) -> None:
    # the same noise through the package, diffusers' scheduler and an ONNX runtime
    pytest.importorskip(runtime)
    denoiser, directory = unet
    ours = sampler.sample(denoiser, start())
    pipeline = DualOutputPipeline.from_denoiser(denoiser, sampler)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(latents=start(), num_inference_steps=5, output_type="latent").images
    torch.testing.assert_close(theirs, ours, **CLOSE)
    torch.testing.assert_close(sampler.sample(OnnxDenoiser(directory, runtime), start()), ours, **CLOSE)


def test_a_runtime_gives_predictions(unet: tuple[Denoiser, Path]) -> None:
    denoiser, directory = unet
    graph = OnnxDenoiser(directory / "model.onnx", "onnxruntime:threads=1")
    assert graph.shape == SHAPE
    x, times = start(), torch.tensor([5, 400, 999])
    with torch.no_grad():
        for t in (0, 999, torch.tensor(7), times):
            a, b = graph(x, t), denoiser(x, t)
            assert a.parts.keys() == b.parts.keys()
            for name in a.parts:
                torch.testing.assert_close(a.parts[name], b.parts[name], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(a.level.alpha * a.x0 + a.level.sigma * a.eps, x, rtol=1e-5, atol=1e-5)
        for route in ("eps", "x0", 0.3):
            a, b = graph.route(route)(x, 500), denoiser.route(route)(x, 500)
            torch.testing.assert_close(a.x0, b.x0, rtol=1e-4, atol=1e-4)
    assert not graph(x.requires_grad_(), 3).x0.requires_grad
    assert graph(x.detach().double(), 3).x0.dtype == torch.float32
    with pytest.raises(InputError, match=r"images of shape \(1, 8, 8\), got \(3, 8, 8\)"):
        graph(torch.zeros(1, 3, 8, 8), 3)
    with pytest.raises(InputError, match="takes no conditions; got class_labels"):
        graph(x, 3, class_labels=torch.zeros(3))


def test_half_precision_does_not_reach_the_division_by_alpha(unet: tuple[Denoiser, Path]) -> None:
    pytest.importorskip("openvino")
    denoiser, directory = unet
    graph = OnnxDenoiser(directory, "openvino:precision=bf16")
    with torch.no_grad():
        a, b = graph(start(), 999), denoiser(start(), 999)
    level = denoiser.schedule.scalars(999)
    for name in ("eps", "x0"):
        assert (a.parts[name] - b.parts[name]).abs().max() < 0.05
    exact = (start() - level.sigma * a.parts["eps"]) / level.alpha
    blended = a.parts["ratio"] * a.parts["x0"] + (1 - a.parts["ratio"]) * exact
    torch.testing.assert_close(a.x0, blended, rtol=1e-4, atol=1e-3)


@pytest.mark.filterwarnings("ignore:this network learned a variance")
@pytest.mark.parametrize(
    ("parameterization", "schedule"),
    [
        (LearnedVariance(Dual(ratio="step")), Cosine(100)),
        (Dual(ratio="velocity"), RectifiedFlow(50)),
        (Karras(), Linear(50, 1e-3, 0.3)),
        (Upgraded(base=Epsilon(), ratio="pixel"), Linear(1000)),
    ],
    ids=lambda v: v.spec,
)
def test_every_way_of_reading(parameterization: Any, schedule: Schedule, tmp_path: Path) -> None:
    denoiser = small(parameterization, schedule)
    checked = write_onnx(denoiser, tmp_path, SHAPE)
    with torch.no_grad():
        parts = denoiser(start(1), 3).parts
    assert checked["difference"].keys() == {"x0", "eps"} | (parts.keys() & {"ratio", "variance"})
    assert max(checked["difference"].values()) < 1e-5
    graph = OnnxDenoiser(tmp_path)
    assert graph.parameterization == parameterization
    for sampler in (samplers.DDIM(5), samplers.DDPM(5, variance="learned" if "variance" in parts else "small")):
        draw = dualout.SeededDraw(range(3), SHAPE)
        a, b = sampler.sample(graph, start(), draw), sampler.sample(denoiser, start(), draw)
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


def test_classes_guidance_and_a_calibration(tmp_path: Path) -> None:
    denoiser, labels, sampler = small(Dual(), classes=4), torch.tensor([0, 2, 1]), samplers.DDIM(3)
    times = sampler.timesteps(denoiser.schedule)
    values = {
        "x0_scale": [1.1, 0.9, 1.05], "eps_scale": [1.0, 1.2, 0.9], "x0_fine": [0.8, 1.0, 1.3],
        "eps_fine": [0.9, 1.0, 1.1], "ratio_gain": [2.0, 1.0, 0.5], "ratio_shift": [0.3, -0.2, 0.0],
        "x0_trend": [0.0, 0.4, -0.3],
    }  # fmt: skip
    calibration = Calibration(sampler.config(), times, values)
    write_onnx(denoiser, tmp_path, SHAPE, calibration=calibration)
    graph = OnnxDenoiser(tmp_path)
    assert graph.record["classes"] == 3

    def both(view: Any) -> tuple[Tensor, Tensor]:
        a, b = (sampler.sample(view(d), start(), class_labels=labels) for d in (graph, denoiser))
        return a, b

    plain, same = both(lambda d: d)
    torch.testing.assert_close(plain, same, **CLOSE)
    torch.testing.assert_close(*both(lambda d: ClassifierFree(d, 2.0, class_labels=3)), rtol=2e-4, atol=2e-4)
    expected = sampler.sample(Calibrated.of(denoiser, calibration), start(), class_labels=labels)
    torch.testing.assert_close(sampler.sample(graph.calibrated(), start(), class_labels=labels), expected, **CLOSE)
    assert (plain - expected).abs().max() > 0.05
    with pytest.raises(InputError, match="takes class_labels; got none"):
        graph(start(), 3)

    # anybody's DDIM, from the graph's x0 and eps and the trend beside it, is the calibrated one
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    x, told = start().numpy(), {"class_labels": labels.numpy()}
    before, trends = 0.0, graph.record["calibration"]["values"]["x0_trend"]
    for t, s, trend in zip(times, [*times[1:], None], trends, strict=True):
        x0, eps = session.run(["x0", "eps"], {"x_t": x, "t": np.full(3, t), **told})
        at, d = denoiser.schedule.scalars(t), trend * (x0.clip(-1, 1) - before)
        before, x0, eps = x0.clip(-1, 1), x0 + d, eps - at.alpha / at.sigma * d
        alpha, sigma = (1.0, 0.0) if s is None else denoiser.schedule.scalars(s)[:2]
        x = (alpha * x0.clip(-1, 1) + sigma * eps).astype(np.float32)
    torch.testing.assert_close(torch.from_numpy(x), expected, **CLOSE)
    # where the calibration says nothing, nothing is predicted
    assert np.isnan(session.run(["x0"], {"x_t": x, "t": np.full(3, 17), **told})[0]).all()


def test_adapters_routes_half_precision_and_weights_beside(tmp_path: Path) -> None:
    network = small(Dual()).network.to(torch.bfloat16)  # type: ignore[union-attr]
    denoiser = Denoiser(ScaledTime(network, 1.0), Dual(), Linear()).train().route("x0")
    write_onnx(denoiser, tmp_path, SHAPE, beside=True)
    assert (tmp_path / "model.onnx.data").is_file()
    # the caller's own stays as it is
    assert denoiser.training
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in denoiser.parameters())
    a, b = (samplers.DDIM(5).sample(d, start()) for d in (OnnxDenoiser(tmp_path), denoiser.float().eval()))
    torch.testing.assert_close(a, b, **CLOSE)


def test_nothing_is_written_when_the_runtime_does_not_agree(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"differs from torch by more than 1e-12: x0 .*; nothing was written"):
        write_onnx(small(Dual()), tmp_path, SHAPE, tolerance=1e-12)
    assert not any(tmp_path.iterdir())

    class Untranslatable(Net):
        def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
            return super().forward(x, t) * (2.0 if float(x.sum()) > 0 else 1.0)

    with pytest.raises(InputError, match="this Untranslatable cannot be translated to ONNX"):
        write_onnx(Denoiser(Untranslatable(3), Dual(), Linear()), tmp_path, SHAPE)
    with pytest.raises(InputError, match="cannot be called with images of shape"):
        write_onnx(small(Dual()), tmp_path, (3, 8, 8))
    assert not any(tmp_path.iterdir())


def test_an_opset_that_cannot_be_had_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InputError, match=r"Net cannot be translated to ONNX with opset 3, only with \d+"):
        write_onnx(small(Dual()), tmp_path / "it", SHAPE, opset=3)
    assert not (tmp_path / "it").exists()
    assert "Traceback" not in caplog.text


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no ONNX file at"):
        OnnxDenoiser(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"is no ONNX file|not written by dualout"):
        OnnxDenoiser(tmp_path)
    value = onnx.helper.make_tensor_value_info("x", 1, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    other = onnx.helper.make_tensor_value_info("y", 1, [1])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [value], [other]))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(InputError, match="not written by dualout"):
        OnnxDenoiser(tmp_path)
    for damaged, says in (("{", "damaged"), ("[]", "damaged"), ('{"format": 99}', "another version of dualout")):
        del model.metadata_props[:]
        onnx.helper.set_model_props(model, {"dualout": damaged})
        onnx.save(model, tmp_path / "model.onnx")
        with pytest.raises(InputError, match=says):
            OnnxDenoiser(tmp_path)


def test_runtimes_are_named(unet: tuple[Denoiser, Path]) -> None:
    _, directory = unet
    assert Runtime.parse("onnx") == Runtime.parse("onnxruntime")
    assert Runtime.parse("openvino:precision=bf16:threads=2").spec == "openvino:threads=2:precision=bf16"
    with pytest.raises(InputError, match="unknown runtime 'tensorrt'"):
        OnnxDenoiser(directory, "tensorrt")
    with pytest.raises(InputError, match="unknown provider of ONNX Runtime here: 'Nope'"):
        OnnxDenoiser(directory, "onnxruntime:provider=Nope")
    with pytest.raises(InputError, match="unknown precision of OpenVINO: 'int3'"):
        OnnxDenoiser(directory, "openvino:precision=int3")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"needs onnxscript, which is not installed: pip install 'dualout\[onnx\]'"):
        write_onnx(small(Dual()), tmp_path, SHAPE)
