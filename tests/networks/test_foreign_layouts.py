"""Networks of other programs, by their class names and layouts: stand-ins, none of their code.

Each stand-in has the class name, the package, the last layers and the signature of the original, and a small body.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

import dualout
from dualout import checkpoint
from dualout.errors import InputError
from dualout.networks import Keyword, Positional, ScaledTime, SigmaConditioned, X0First, build, widen

STEPS = torch.tensor([3, 700])


def of(package: str) -> Callable[[type], type]:
    """Say that a class is that package's."""

    def moved(cls: type) -> type:
        cls.__module__ = package
        return cls

    return moved


class Body(nn.Module):
    """Convolutions with time and class between them."""

    def __init__(self, channels: int, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.time, self.label = nn.Linear(1, width), nn.Embedding(5, width)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.first(x) + self.time(t.float()[:, None] / 1000)[..., None, None]
        return h if y is None else h + self.label(y)[..., None, None]


@of("guided_diffusion.unet")
class UNetModel(nn.Module):
    """out ends with a convolution; classes are the third argument."""

    def __init__(self, channels: int = 3, out_channels: int = 6, num_classes: int | None = 5) -> None:
        super().__init__()
        self.num_classes, self.out_channels = num_classes, out_channels
        self.body = Body(channels)
        self.out = nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, out_channels, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        if (y is not None) != (self.num_classes is not None):
            raise AssertionError("must specify y if and only if the model is class-conditional")
        return self.out(self.body(x, timesteps, y))


@of("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
class Unet(nn.Module):
    """A 1×1 convolution at the end; the third argument is its last belief."""

    def __init__(self, channels: int = 3, out_dim: int | None = None, self_condition: bool = True) -> None:
        super().__init__()
        self.channels, self.self_condition = channels, self_condition
        self.out_dim = out_dim or channels
        self.init_conv = Body(channels * (2 if self_condition else 1))
        self.final_conv = nn.Conv2d(8, self.out_dim, 1)

    def forward(self, x: Tensor, time: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        if self.self_condition:
            x = torch.cat([torch.zeros_like(x) if x_self_cond is None else x_self_cond, x], 1)
        return self.final_conv(self.init_conv(x, time).relu())


@of("denoising_diffusion_pytorch.classifier_free_guidance")
class GuidedUnet(Unet):
    """Told the class under its own name."""

    def forward(self, x: Tensor, time: Tensor, classes: Tensor, cond_drop_prob: float | None = None) -> Tensor:  # type: ignore[override]
        return self.final_conv(self.init_conv(x, time, classes).relu())


@of("k_diffusion.models.image_v1")
class ImageDenoiserModelV1(nn.Module):
    """Patches are shuffled, all rows of a channel together."""

    def __init__(self, c_in: int = 3, patch_size: int = 2, has_variance: bool = False) -> None:
        super().__init__()
        self.c_in, self.patch_size, self.has_variance = c_in, patch_size, has_variance
        self.body = Body(c_in * patch_size**2)
        self.proj_out = nn.Conv2d(8, c_in * patch_size**2 + has_variance, 1)

    def forward(self, input: Tensor, sigma: Tensor, mapping_cond: Tensor | None = None) -> Tensor:
        h = self.body(pixel_unshuffle(input, self.patch_size), sigma.log() / 4).relu()
        return pixel_shuffle(self.proj_out(h), self.patch_size)


@of("k_diffusion.models.image_transformer_v2")
class Linear(nn.Linear):
    """Counts operations."""


class TokenSplitWithoutSkip(nn.Module):
    """Patches, a pixel's channels next to each other."""

    def __init__(self, in_features: int, out_features: int, patch_size: tuple[int, int]) -> None:
        super().__init__()
        self.h, self.w = patch_size
        self.proj = Linear(in_features, out_features * self.h * self.w, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        x = self.proj(x).view(batch, height, width, self.h, self.w, -1)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(batch, height * self.h, width * self.w, -1)


@of("k_diffusion.models.image_transformer_v2")
class ImageTransformerDenoiserModelV2(nn.Module):
    """Channels are last inside."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.body = Body(channels)
        self.patch_out = TokenSplitWithoutSkip(8, channels, (2, 2))

    def forward(self, x: Tensor, sigma: Tensor, aug_cond: Any = None, class_cond: Tensor | None = None) -> Tensor:
        h = self.body(x, sigma.log() / 4, class_cond)[..., ::2, ::2].relu()
        return self.patch_out(h.movedim(1, -1)).movedim(-1, 1)


@of("k_diffusion.layers")
class Denoiser(nn.Module):
    """EDM's preconditioning around a model."""

    def __init__(self, inner_model: nn.Module, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.inner_model, self.sigma_data = inner_model, sigma_data

    def forward(self, input: Tensor, sigma: Tensor, **conditions: Any) -> Tensor:
        s, d = sigma.view(-1, 1, 1, 1), self.sigma_data
        power = s**2 + d**2
        raw = self.inner_model(input / power.sqrt(), sigma, **conditions)
        return raw * (s * d / power.sqrt()) + input * (d**2 / power)


@of("src.unet")
class Model(nn.Module):
    """The authors' network, and DDIM's: (x, t), a convolution at the end."""

    def __init__(self, in_channels: int = 3, out_channels: int = 7) -> None:
        super().__init__()
        self.body = Body(in_channels)
        self.norm_out = nn.GroupNorm(4, 8)
        self.conv_out = nn.Conv2d(8, out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        assert x.shape[2] == x.shape[3] == 32
        return self.conv_out(self.norm_out(self.body(x, t)).relu())


EDM = dualout.schedules.EDM()
NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "guided-diffusion with classes": (lambda: Positional(UNetModel(), ["class_labels"]), {"class_labels": STEPS % 5}),
    "guided-diffusion": (lambda: UNetModel(num_classes=None), {}),
    "improved-diffusion of 4000 steps": (lambda: ScaledTime(UNetModel(num_classes=None), 0.25), {}),
    "denoising-diffusion-pytorch": (Unet, {}),
    "denoising-diffusion-pytorch with its last belief": (Unet, {"x_self_cond": torch.ones(2, 3, 32, 32)}),
    "denoising-diffusion-pytorch with classes": (
        lambda: Keyword(GuidedUnet(self_condition=False), "time", {"class_labels": "classes"}),
        {"class_labels": STEPS % 5},
    ),
    "k-diffusion's UNet": (lambda: SigmaConditioned(ImageDenoiserModelV1(), EDM), {}),
    "k-diffusion's UNet of pixels": (lambda: SigmaConditioned(ImageDenoiserModelV1(patch_size=1), EDM), {}),
    "k-diffusion's transformer": (
        lambda: SigmaConditioned(ImageTransformerDenoiserModelV2(), EDM),
        {"class_cond": STEPS % 5},
    ),
    "DDIM's": (lambda: Model(out_channels=3), {}),
}


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_they_are_called_and_widened(name: str) -> None:
    torch.manual_seed(2)
    make, conditions = NETWORKS[name]
    network, x = make().eval(), dualout.noise(range(2), (3, 32, 32))
    before = network(x, STEPS, **conditions)
    old, new = before.shape[1], 2 * before.shape[1] + 1
    wide = widen(network, new, init=nn.init.ones_)
    after = wide(x, STEPS, **conditions)
    assert after.shape == (2, new, 32, 32)
    assert torch.equal(after[:, :old], before)
    # every new channel is that of rows of ones, in all of its pixels
    assert after[:, old].std() > 0
    torch.testing.assert_close(after[:, old:], after[:, old : old + 1].expand(-1, new - old, -1, -1))
    assert torch.equal(network(x, STEPS, **conditions), before)


@pytest.mark.parametrize("name", ["guided-diffusion", "denoising-diffusion-pytorch", "DDIM's"])
def test_widened_networks_sample_as_before(name: str) -> None:
    torch.manual_seed(2)
    network = NETWORKS[name][0]()
    kind: Any = {"guided-diffusion": dualout.Parameterization.parse("learned")}.get(name, dualout.Epsilon())
    schedule, noise = dualout.schedules.Linear(), dualout.noise(range(2), (3, 32, 32))
    sampler = dualout.samplers.DPMSolver(steps=3)
    expected = sampler.sample(dualout.Denoiser(network, kind, schedule).eval(), noise)
    if name == "guided-diffusion":
        # the variance comes last
        wide, dual = widen(network, 10, places=[0, 1, 2, 7, 8, 9]), dualout.Parameterization.parse("learned:base=dual")
    else:
        wide, dual = widen(network, 7), dualout.Dual()
    assert torch.equal(sampler.sample(dualout.Denoiser(wide, dual, schedule).eval().route("eps"), noise), expected)


def test_they_keep_count_of_their_channels() -> None:
    assert widen(UNetModel(), 13).out_channels == 13
    assert widen(Unet(), 7).out_dim == 7
    assert len(widen(ImageDenoiserModelV1(), 7).proj_out.weight) == 28


def test_a_model_of_k_diffusion_is_read_as_in_its_own_preconditioning() -> None:
    torch.manual_seed(2)
    model = ImageDenoiserModelV1()
    noise = dualout.noise(range(2), (3, 8, 8))
    for schedule in (EDM, dualout.schedules.Linear()):
        inside = dualout.Denoiser(SigmaConditioned(model, schedule), dualout.Karras(sigma_data=0.5), schedule)
        around = SigmaConditioned(Denoiser(model, 0.5), schedule, exploding=True)
        outside = dualout.Denoiser(around, dualout.CleanImage(), schedule)
        t = torch.tensor([2, schedule.steps - 1])
        level = schedule.level(t).like(noise)
        x_t = level.alpha * noise.flip(0) + level.sigma * noise
        torch.testing.assert_close(inside(x_t, t).x0, outside(x_t, t).x0, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match=r"adds the noisy image.*widen\(network.inner_model"):
        widen(around, 7)
    with pytest.raises(InputError, match="a row for its loss beside the channels"):
        widen(ImageDenoiserModelV1(has_variance=True), 7)


def test_the_authors_order() -> None:
    torch.manual_seed(2)
    network, x_t = Model(), dualout.noise(range(2), (3, 32, 32))
    raw = network(x_t, STEPS)
    schedule = dualout.schedules.Linear()
    p = dualout.Denoiser(X0First(network), dualout.Dual(), schedule)(x_t, STEPS)
    x0, eps, ratio = raw[:, :3], raw[:, 3:6], raw[:, 6:].sigmoid()
    assert torch.equal(p.parts["x0"], x0)
    assert torch.equal(p.parts["eps"], eps)
    alpha, sigma = (v.float().view(-1, 1, 1, 1) for v in schedule.level(STEPS)[:2])
    torch.testing.assert_close(p.x0, ratio * x0 + (1 - ratio) * (x_t - sigma * eps) / alpha, rtol=1e-4, atol=1e-3)
    with pytest.raises(InputError, match="6 output channels or more; got 3"):
        X0First(Model(out_channels=3))(x_t, STEPS)


@pytest.mark.parametrize(
    "adapt",
    [X0First, lambda n: Keyword(n, "timestep"), lambda n: Keyword(X0First(n), conditions={"y": "class_labels"})],
    ids=["x0 first", "keyword", "nested"],
)
def test_adapters_are_written_down(adapt: Callable[[nn.Module], nn.Module]) -> None:
    adapter = adapt(build("tiny", 1, 8, 3, classes=2)).eval()
    described = checkpoint.describe(adapter)
    again = checkpoint.construct(described).eval()
    assert checkpoint.describe(again) == described
    assert type(again) is type(adapter)


def test_keywords_are_names() -> None:
    def network(x: Tensor, text: Tensor | None = None, when: Tensor | None = None) -> Tensor:
        assert when is not None
        return x * when.view(-1, 1, 1, 1) + (0 if text is None else text)

    x = torch.randn(2, 3, 4, 4)
    adapter = Keyword(network, "when", {"caption": "text"})
    assert torch.equal(adapter(x, STEPS, caption=torch.tensor(2)), x * STEPS.view(-1, 1, 1, 1) + 2)
    with pytest.raises(InputError, match="each once"):
        Keyword(network, "text", {"caption": "text"})
    with pytest.raises(InputError, match="own names"):
        Keyword(network, "")
