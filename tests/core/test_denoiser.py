"""The denoiser: calling conventions, routes that share weights, loss, precision."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dualout
from dualout.calibrated import Calibrated
from dualout.denoiser import Denoiser
from dualout.errors import InputError
from dualout.guidance import ClassifierFree
from dualout.parameterizations import CleanImage, Dual, Epsilon, Karras, Parameterization, Velocity
from dualout.samplers import DDIM
from dualout.schedules import Cosine, Linear
from oneconv import Net, T, images
from variants import parameterizations


def test_public_names() -> None:
    assert dualout.Denoiser is Denoiser
    for package in (dualout, dualout.training, dualout.export):
        assert set(package.__all__) <= set(dir(package))
    for name in dualout.__all__:
        assert getattr(dualout, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dualout.nothing  # type: ignore[attr-defined]


@pytest.mark.parametrize("wrap", [lambda y: y, lambda y: (y, "more"), lambda y: SimpleNamespace(sample=y)])
def test_outputs_of_every_shape_are_taken(wrap) -> None:
    x, net = images(), Net()
    expected = Denoiser(net, Dual(), Cosine(T))(x, 7)
    got = Denoiser(lambda x, t: wrap(net(x, t)), Dual(), Cosine(T))(x, 7)
    assert torch.equal(got.x0, expected.x0)


@pytest.mark.parametrize("output", [None, 3.0, "tensor", (), SimpleNamespace(images=torch.zeros(1))])
def test_another_output_is_refused(output: object) -> None:
    with pytest.raises(InputError, match="a network returns a tensor"):
        Denoiser(lambda x, t: output, Dual(), Cosine(T))(images(), 7)


def test_the_network_gets_steps_as_whole_numbers_one_an_image() -> None:
    seen = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return x

    denoiser = Denoiser(network, Epsilon(), Cosine(T))
    denoiser(images(), 7)
    denoiser(images(), torch.tensor(7))
    denoiser(images(), torch.tensor([7, 7, 7]))
    assert all(t.tolist() == [7, 7, 7] and t.dtype == torch.long for t in seen)


def test_conditions_are_passed_on() -> None:
    def network(x: Tensor, t: Tensor, *, scale: float, label: Tensor) -> Tensor:
        return x * scale + label.view(-1, 1, 1, 1)

    x, label = images(), torch.tensor([1.0, 2.0, 3.0])
    p = Denoiser(network, CleanImage(), Cosine(T))(x, 3, scale=2.0, label=label)
    assert torch.equal(p.x0, 2 * x + label.view(-1, 1, 1, 1))


def test_karras_scales_what_the_network_sees() -> None:
    seen = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return 0 * x

    # data of standard deviation sigma_data: what the network sees has unit variance at every level
    schedule, sigma_data = Linear(), 0.5
    assert Karras() == Karras(sigma_data=0.5), "the paper's"
    x0, noise = sigma_data * torch.randn(2000, 1, 2, 2), torch.randn(2000, 1, 2, 2)
    for t in (0, 400, 999):
        level = schedule.scalars(t)
        x_t = level.alpha * x0 + level.sigma * noise
        p = Denoiser(network, Karras(sigma_data=sigma_data), schedule)(x_t, t)
        assert seen[-1].std() == pytest.approx(1, abs=0.03)
        # F = 0 predicts what is best for Gaussian data
        best = level.alpha * sigma_data**2 / (level.alpha**2 * sigma_data**2 + level.sigma**2) * x_t
        torch.testing.assert_close(p.x0, best, rtol=1e-5, atol=1e-6)


def test_karras_with_unit_data_is_velocity_but_for_the_sign() -> None:
    raw, x = torch.randn(2, 3, 2, 4, 4)
    a = Denoiser(lambda x, t: raw, Karras(sigma_data=1.0), Cosine(T))(x, 20)
    b = Denoiser(lambda x, t: -raw, Velocity(), Cosine(T))(x, 20)
    torch.testing.assert_close(a.x0, b.x0, rtol=1e-5, atol=1e-5)


def test_routes_share_weights() -> None:
    denoiser, x = Denoiser(Net(), Dual(), Cosine(T)), images()
    view = denoiser.route("velocity")
    assert view.network is denoiser.network
    before = view(x, 7).x0
    with torch.no_grad():
        for p in denoiser.parameters():
            p.mul_(2)
    assert not torch.equal(before, view(x, 7).x0)
    assert next(view.parameters()) is next(denoiser.parameters())
    assert denoiser.parameterization == Dual()  # itself unchanged


def test_a_route_leaves_the_mode_of_the_shared_network_to_its_owner() -> None:
    network = nn.Sequential(Net(5), nn.Dropout(0.5)).eval()
    denoiser = Denoiser(network, Dual(), Linear())
    view = denoiser.route("eps")
    assert view.training is denoiser.training
    assert not any(module.training for module in network.modules())


def test_routes_are_fixed_ratios() -> None:
    x, net = images(), Net()
    denoiser = Denoiser(net, Dual(), Cosine(T))
    raw = net(x, torch.full((3,), 7))
    level = Cosine(T).scalars(7)
    routes = {
        "x0": raw[:, 2:4],
        1.0: raw[:, 2:4],
        "eps": (x - level.sigma * raw[:, :2]) / level.alpha,
        0.0: (x - level.sigma * raw[:, :2]) / level.alpha,
        "mix": denoiser(x, 7).x0,
    }
    for route, expected in routes.items():
        torch.testing.assert_close(denoiser.route(route)(x, 7).x0, expected)
    sigma2 = level.sigma**2
    torch.testing.assert_close(denoiser.route("velocity")(x, 7).x0, denoiser.route(sigma2)(x, 7).x0)
    assert denoiser.route(0.3).parameterization == Dual(ratio=0.3)


def test_the_eps_route_is_an_eps_model() -> None:
    net = Net()
    denoiser = Denoiser(net, Dual(), Cosine(T))
    single = Denoiser(lambda x, t: net(x, t)[:, :2], Epsilon(), Cosine(T))
    noise = dualout.noise(range(3), (2, 4, 4))
    a, b = (DDIM(steps=5).sample(d, noise) for d in (denoiser.route("eps"), single))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_velocity_route_is_a_velocity_model() -> None:
    net = Net().double()
    schedule = Cosine(T)

    def v(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.level(t).like(x)[:2]
        eps, x0, _ = net(x, t).split([2, 2, 1], 1)
        return alpha * eps - sigma * x0

    noise = dualout.noise(range(3), (2, 4, 4), dtype=torch.float64)
    a = DDIM(steps=7).sample(Denoiser(net, Dual(), schedule).route("velocity"), noise)
    b = DDIM(steps=7).sample(Denoiser(v, Velocity(), schedule), noise)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_route_keeps_mode_card_and_table() -> None:
    denoiser = Denoiser(Net(4), Dual(ratio="step"), Cosine(T)).eval()
    denoiser.card["title"] = "a model"
    assert not denoiser.route("eps").training
    assert denoiser.route("eps").card is denoiser.card
    assert denoiser.route("eps").head is None
    assert denoiser.route("mix").head is denoiser.head
    assert denoiser.route("eps")(images(), 3).x0.shape == (3, 2, 4, 4)


@pytest.mark.parametrize("parameterization", parameterizations())
def test_unknown_routes_are_refused(parameterization: Parameterization) -> None:
    with pytest.raises(InputError, match="route"):
        parameterization.route("velocty")
    x, raw = images(1), torch.zeros(1, parameterization.channels(2), 4, 4)
    if "ratio" not in Denoiser(lambda x, t: raw, parameterization, Cosine(T))(x, 3).parts:
        with pytest.raises(InputError, match="Only dual-output networks"):
            parameterization.route(0.5)


def test_loss_noises_as_it_says() -> None:
    seen = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, t))
        return torch.zeros_like(x)

    x0, noise, t = images(4), images(4), torch.tensor([0, 10, 30, 49])
    loss = Denoiser(network, Epsilon(), Cosine(T)).loss(x0, t, noise)
    (x_t, time), level = seen[0], Cosine(T).level(t)
    for b in range(4):
        torch.testing.assert_close(x_t[b], level.alpha[b].float() * x0[b] + level.sigma[b].float() * noise[b])
    assert time is t
    torch.testing.assert_close(loss.parts["eps"], noise.square().mean((1, 2, 3)))
    torch.testing.assert_close(loss.total, noise.square().mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_images_in_half_precision_are_noised_in_single(dtype: torch.dtype) -> None:
    # at t = 0 of the linear schedule sigma is 0.01: rounded to bfloat16, x_t errs by as much as a tenth of the noise
    x0, noise, t = images(64).to(dtype), images(64).to(dtype), torch.zeros(64, dtype=torch.long)
    level = Linear().scalars(0)

    def perfect(x_t: Tensor, t: Tensor) -> Tensor:
        return (x_t - level.alpha * x0.to(x_t.dtype)) / level.sigma

    assert Denoiser(perfect, Epsilon(), Linear()).loss(x0, t, noise).total < 1e-8


def test_a_loss_takes_noise_and_time_steps_of_its_images_only() -> None:
    denoiser, x0 = Denoiser(Net(), Dual(), Cosine(T)), images()
    with pytest.raises(InputError, match=r"noise of its own, .*: got \(1, 2, 4, 4\) for \(3, 2, 4, 4\)"):
        denoiser.loss(x0, torch.tensor([1, 2, 3]), images(1))
    with pytest.raises(InputError, match=r"say torch.randn_like\(x0\): got None for"):
        denoiser.loss(x0, 3, None)  # type: ignore[arg-type]
    # four, as many as the images are wide
    for look in (lambda t: denoiser.loss(x0, t, images()), lambda t: denoiser(x0, t)):
        with pytest.raises(InputError, match=r"3 images have one time step, or one each; got t of shape \(4,\)"):
            look(torch.tensor([1, 2, 3, 4]))
        with pytest.raises(InputError, match=r"one each; got t of shape \(3, 1\)"):
            look(torch.tensor([[1], [2], [3]]))
    pixels = torch.randint(0, 256, (3, 2, 4, 4), dtype=torch.uint8)
    with pytest.raises(InputError, match=r"images are floats in \[−1, 1\], got torch.uint8"):
        denoiser.loss(pixels, torch.tensor([1, 2, 3]), pixels)
    with pytest.raises(InputError, match=r"images are floats in \[−1, 1\], got torch.int64"):
        DDIM(steps=2).sample(denoiser, pixels.long())


def test_one_time_step_may_be_told_in_any_way() -> None:
    denoiser, x = Denoiser(Net(), Dual(), Cosine(T)), images()
    expected = denoiser(x, torch.tensor([7, 7, 7])).x0
    small = [torch.full((3,), 7, dtype=dtype) for dtype in (torch.uint8, torch.int16, torch.int32)]
    # networks that look it up take no small integers, and those that scale it would run over
    told = []
    listening = Denoiser(lambda x, t: (told.append(t.dtype), denoiser.network(x, t))[1], Dual(), Cosine(T))
    for t in (7, np.int64(7), np.array(7), torch.tensor(7), torch.tensor([7]), *small):
        torch.testing.assert_close(listening(x, t).x0, expected)  # type: ignore[arg-type]
    assert set(told) == {torch.int64}
    # a time from 0 to 1 would be t = 0
    for t in (torch.tensor([0.2, 0.5, 0.9]), torch.tensor(0.5), torch.tensor([True, False, True])):
        for look in (lambda t: denoiser(x, t), lambda t: denoiser.loss(x, t, x)):
            with pytest.raises(InputError, match=r"a time step is an integer from 0 to \d+, got a tensor of torch\."):
                look(t)
    with pytest.raises(InputError, match="a network is a module or function"):
        Denoiser(None, Dual(), Cosine(T))  # type: ignore[arg-type]


def test_half_precision_networks_are_given_their_own() -> None:
    seen = []

    class Half(Net):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            seen.append(x.dtype)
            return super().forward(x, t)

    denoiser = Denoiser(Half(), Dual(), Cosine(T))
    assert denoiser(images(), 3).x0.dtype == torch.float32
    p = denoiser.to(torch.bfloat16)(images(), 3)
    assert seen == [torch.float32, torch.bfloat16]
    assert p.x0.dtype == p.parts["eps"].dtype == torch.float32
    assert denoiser.double()(images().double(), 3).x0.dtype == torch.float64
    # float64 images through a float32 network: the network's precision, the images' steps
    assert denoiser.float()(images().double(), 3).x0.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_network_that_changes_its_precision_later_is_given_its_own(dtype: torch.dtype) -> None:
    network, x = Net(), images()
    denoiser = Denoiser(network, Dual(), Cosine(T))
    copied = copy.deepcopy(denoiser)
    for changed, own in ((denoiser, network), (copied, copied.network)):
        own.to(dtype)
        assert torch.equal(changed(x, 7).x0, Denoiser(own, Dual(), Cosine(T))(x, 7).x0)


def test_images_of_any_size_and_colour() -> None:
    for channels, height, width in ((1, 5, 7), (3, 8, 4), (4, 1, 1)):
        x = torch.randn(2, channels, height, width)
        denoiser = Denoiser(lambda x, t: x.repeat(1, 3, 1, 1)[:, : 2 * x.shape[1] + 1], Dual(), Cosine(T))
        assert denoiser(x, 3).x0.shape == x.shape
        assert DDIM(steps=2).sample(denoiser, x).shape == x.shape


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(InputError, match=r"dualout\.Dual\(\)"):
        Denoiser(Net(), Dual, Cosine(T))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="Linear"):
        Denoiser(Net(), Dual(), "linear")  # type: ignore[arg-type]
    denoiser = Denoiser(Net(), Dual(), Cosine(T))
    with pytest.raises(InputError, match="from 0 to 49"):
        denoiser(images(), 50)
    with pytest.raises(InputError, match=r"torch\.from_numpy\(x\); got ndarray"):
        denoiser.loss(images().numpy(), 3, images())  # type: ignore[arg-type]
    for look in (lambda: denoiser(None, 3), lambda: denoiser.loss(None, 3, images())):  # type: ignore[arg-type]
        with pytest.raises(InputError, match="got NoneType"):
            look()
    for draw, got in ((images(), "function of the step k, .* got Tensor"), (lambda k: None, "got NoneType")):
        with pytest.raises(InputError, match=got):
            DDIM(steps=2, eta=1.0).sample(denoiser, images(), draw)  # type: ignore[arg-type]


@pytest.mark.parametrize("other", [Net(), nn.DataParallel(Denoiser(Net(), Dual(), Cosine(T))), None])
def test_samplers_and_wrappers_ask_denoisers(other) -> None:
    with pytest.raises(InputError, match="a sampler asks a denoiser, which has a schedule; got"):
        DDIM(steps=2).sample(other, images())
    with pytest.raises(InputError, match="a calibration wraps a denoiser"):
        Calibrated(other, [3], {"x0_scale": [1.0]})


def test_what_a_denoiser_is_can_be_seen() -> None:
    denoiser = Denoiser(Net(), Dual(gate="balanced"), Cosine(T))
    assert "parameterization=dual:gate=balanced, schedule=cosine of 50" in repr(denoiser)
    assert "scale=2.0" in repr(ClassifierFree(denoiser, 2, label=0))


def test_weights_move_with_the_denoiser() -> None:
    denoiser = Denoiser(Net(4), Dual(ratio="step"), Cosine(T))
    assert set(denoiser.state_dict()) == {"network.conv.weight", "network.conv.bias", "head.logit"}
    assert denoiser.to("meta").times.is_meta


def test_all_of_a_denoiser_is_where_its_network_is() -> None:
    # the meta device stands for a GPU, from which nothing can be moved back unnoticed
    network = nn.Conv2d(1, 3, 1).to("meta")
    plain = Denoiser(lambda x, t: network(x), Dual(), Linear()).to("meta")
    for denoiser in (Denoiser(network, Dual(), Linear()), Denoiser(network, Dual(ratio="step"), Linear()), plain):
        for view in (denoiser, denoiser.route("eps"), denoiser.route("velocity").route("x0")):
            tensors = [*view.parameters(), *view.buffers()]
            assert tensors
            assert all(v.is_meta for v in tensors)


def test_what_is_printed_in_a_notebook_is_a_line():
    torch.manual_seed(0)
    denoiser = Denoiser(lambda x, t: x.repeat(1, 3, 1, 1)[:, :3], Dual(), Linear())
    x0, t, noise = torch.zeros(2, 1, 4, 4), torch.tensor([10, 900]), torch.ones(2, 1, 4, 4)
    loss, prediction = denoiser.loss(x0.requires_grad_(), t, noise), denoiser(noise, 500)
    assert re.fullmatch(r"Loss\([\d.]+: eps [\d.]+, x0 [\d.]+, mu [\d.e-]+\)", repr(loss))
    assert repr(prediction) == "Prediction(2×1×4×4 of eps, x0, ratio)"


def test_what_a_parameterization_of_ones_own_gives_is_looked_at() -> None:
    """The mean of a batch or a map of errors would pass for a number an image, and be averaged as one."""

    given: list[Any] = []

    class Own(Epsilon):
        def losses(self, prediction, x0, eps):
            return given[-1]

    denoiser = Denoiser(lambda x, t: x, Own(), Linear())
    x = torch.rand(4, 1, 8, 8)
    wrong = {"eps": x.mean()}, {"eps": x.square()}, {"eps": 0.5}, {}, None, x.flatten(1).mean(1)
    for losses, says in zip(wrong, (r"\(\)", r"\(4, 1, 8, 8\)", r"\(\)", "dict", "NoneType", "Tensor"), strict=True):
        given.append(losses)
        with pytest.raises(InputError, match=rf"losses\(\) of parameterization 'own' .* of shape \(4,\).*{says}"):
            denoiser.loss(x, 3, x)
    given.append({"eps": x.flatten(1).mean(1)})
    assert denoiser.loss(x, 3, x).total == x.flatten(1).mean(1).mean()

    class Plain(Epsilon):
        def read(self, raw, x_t, level):
            return raw

    with pytest.raises(InputError, match=r"read\(\) of parameterization 'plain' returns a Prediction; got Tensor"):
        Denoiser(lambda x, t: x, Plain(), Linear())(x, 3)
