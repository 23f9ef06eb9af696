"""From one output to two: what must stay as it was, what is solved for, and where the gate may open."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dualout
from dualout.data.dataset import Dataset
from dualout.denoiser import Denoiser
from dualout.errors import InputError
from dualout.networks import build
from dualout.parameterizations import (
    CleanImage,
    Dual,
    Epsilon,
    Flow,
    Karras,
    LearnedVariance,
    Parameterization,
    Upgraded,
    Velocity,
)
from dualout.samplers import DDIM, DDPM, DPMSolver
from dualout.training import noised, opening, readout
from dualout.training.upgrade import (
    gate_logits,
    last_block,
    new_rows,
    open_gate,
    output_layer,
    set_scope,
    upgrade,
    upgraded_of,
)
from dualout.training.upgrade_config import UpgradeConfig

SCHEDULE = dualout.schedules.Linear(200, 5e-4, 0.08)
CPU = torch.device("cpu")
SOURCES = [Epsilon(), CleanImage(), Velocity(), Flow(), Karras(), LearnedVariance(), LearnedVariance(Velocity())]
SOURCE = pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.spec)


def trained(parameterization: Parameterization, channels: int = 1) -> Denoiser:
    network = build("tiny:width=8", channels, 8, parameterization.channels(channels))
    return Denoiser(network, parameterization, SCHEDULE).eval()


def noises(count: int = 3, channels: int = 1) -> Tensor:
    return dualout.noise(range(count), (channels, 8, 8))


def draw(k: int) -> Tensor:
    return dualout.noise(range(100 * k + 7, 100 * k + 10), (1, 8, 8))


@SOURCE
@pytest.mark.filterwarnings("ignore:this network learned a variance")
def test_samples_are_the_originals_bit_for_bit(source: Parameterization, tmp_path) -> None:
    before = trained(source)
    after = upgrade(before)
    x = noises()
    variance = "learned" if isinstance(source, LearnedVariance) else "large"
    for sampler in (DDIM(steps=4), DDIM(steps=3, eta=1.0), DPMSolver(steps=3), DDPM(steps=3, variance=variance)):
        expected = sampler.sample(before, x, draw)
        assert torch.equal(sampler.sample(after, x, draw), expected), sampler.spec
    after.save_pretrained(tmp_path / "saved")
    loaded = Denoiser.from_pretrained(tmp_path / "saved")
    assert loaded.parameterization == after.parameterization
    assert torch.equal(DDIM(steps=4).sample(loaded, x), DDIM(steps=4).sample(before, x))


@SOURCE
@pytest.mark.parametrize("channels", [1, 3])
def test_the_old_channels_are_bit_identical_and_the_new_ones_where_dual_output_has_them(source, channels) -> None:
    before = trained(source, channels)
    after = upgrade(before)
    x, t = noises(2, channels), torch.tensor([3, 150])
    with torch.no_grad():
        old, new = before.network(x, t).sample, after.network(x, t).sample
    learned = isinstance(source, LearnedVariance)
    c = channels
    assert new.shape[1] == (3 * c if learned else 2 * c) + 1
    first = c if upgraded_of(after).trained == "x0" else 0
    assert torch.equal(new[:, first : first + c], old[:, :c])
    if learned:
        assert torch.equal(new[:, 2 * c + 1 :], old[:, c:])
    p = after(x, t)
    assert torch.equal(p.parts["x0"] if source.name == "x0" else p.x0, before(x, t).x0)
    assert p.parts["ratio"].unique().tolist() == [upgraded_of(after).closed]
    if source.name != "x0":
        torch.testing.assert_close(p.parts["eps"], before(x, t).eps, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", [Dual(), LearnedVariance(), "eps"], ids=str)
def test_only_one_output_can_be_the_trained_one(base) -> None:
    with pytest.raises(InputError, match="starts from a parameterization of one output"):
        Upgraded(base=base)


def test_the_source_is_not_changed_and_the_count_grows_by_the_rows() -> None:
    before = trained(Epsilon(), 3)
    state = {k: v.clone() for k, v in before.state_dict().items()}
    after = upgrade(before)
    assert all(torch.equal(v, state[k]) for k, v in before.state_dict().items())
    grown = sum(p.numel() for p in after.parameters()) - sum(p.numel() for p in before.parameters())
    # 3 + 1 rows of a 3×3 convolution of 8 channels, and their biases
    assert grown == 4 * (8 * 9 + 1)


@pytest.mark.parametrize("source", [Dual(), Dual(ratio=0.5), LearnedVariance(Dual())])
def test_two_outputs_are_not_upgraded_again(source) -> None:
    with pytest.raises(InputError, match="two outputs already"):
        upgrade(trained(source))
    with pytest.raises(InputError, match="two outputs already"):
        upgrade(upgrade(trained(Epsilon())))


def test_a_learned_variance_is_no_more_channels_of_images() -> None:
    network = trained(LearnedVariance()).network
    with pytest.raises(InputError, match=r"takes 1 channels and gives 2, .* LearnedVariance\(Epsilon\(\)\)"):
        upgrade(Denoiser(network, Epsilon(), SCHEDULE))
    with pytest.raises(InputError, match="one that learned a variance too is read by LearnedVariance"):
        Denoiser(network, Epsilon(), SCHEDULE)(noises(), 3)


class Told(nn.Module):
    """Is told something that nobody can guess."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.out(x) + 0 * text.view(3).sum()


def test_a_network_that_is_told_more_needs_an_example() -> None:
    before = Denoiser(Told(), Epsilon(), SCHEDULE).eval()
    with pytest.raises(InputError, match=r"cannot be called as.*text.*say example=\(x_t, t, \{…\}\)"):
        upgrade(before)
    text, x = torch.ones(3), noises()
    after = upgrade(before, example=(x, torch.tensor([1, 2, 3]), {"text": text}))
    assert torch.equal(DDIM(3).sample(after, x, text=text), DDIM(3).sample(before, x, text=text))


def test_a_network_in_half_precision_takes_an_example_in_float32() -> None:
    before = trained(Epsilon()).to(torch.bfloat16)
    after = upgrade(before, example=(noises(), torch.tensor([1, 2, 3])))
    for sampler in (DDIM(3), DPMSolver(4)):
        assert torch.equal(sampler.sample(after, noises()), sampler.sample(before, noises()))


def test_a_function_is_refused() -> None:
    with pytest.raises(InputError, match=r"only a torch\.nn\.Module"):
        upgrade(Denoiser(lambda x, t: x, Epsilon(), SCHEDULE))
    with pytest.raises(InputError, match="upgrade takes a denoiser, a network with how it is read; got Conv2d"):
        upgrade(nn.Conv2d(1, 1, 1))  # type: ignore[arg-type]


# the closed form


class Toy(nn.Module):
    """Random features, then a layer."""

    def __init__(self, last: nn.Conv2d) -> None:
        super().__init__()
        self.features = nn.Conv2d(1, 3, 3, padding=1)
        self.last = last

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(torch.tanh(self.features(x) + 0.01 * t.view(-1, 1, 1, 1)))


def toy_batches(count: int = 6, bins: int = 3, size: int = 5) -> list[noised.Noised]:
    x0 = dualout.noise(range(4 * count), (1, size, size)).tanh()
    eps = dualout.noise(range(1000, 1000 + 4 * count), (1, size, size))
    t = torch.arange(4 * count) * 8 % 200
    return [noised.Noised(k % bins, x0[4 * k :][:4], t[4 * k :][:4], eps[4 * k :][:4], {}) for k in range(count)]


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"padding": 1, "padding_mode": "circular"},
        {"padding": "same", "dilation": 2},
        {"padding": 1, "bias": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("source", [Epsilon(), CleanImage()])
def test_the_closed_form_equals_dense_least_squares(options, source) -> None:
    after = upgrade(Denoiser(Toy(nn.Conv2d(3, 1, 3, **options)), source, SCHEDULE))
    batches = toy_batches()
    new, target = (slice(0, 1), "noise") if source.name == "x0" else (slice(1, 2), "x0")
    moments, rows = readout.collect(after, "last", new, batches, 3, target=target)
    assert rows.tolist() == [new.start]
    solution = moments.solve(ridge=0.0)
    # every pixel's equation written out, with torch's own unfold
    phi, y = [], []
    for b in batches:
        level = SCHEDULE.level(b.t).like(b.x0)
        h = torch.tanh(
            after.network.features(level.alpha * b.x0 + level.sigma * b.noise) + 0.01 * b.t.view(-1, 1, 1, 1)
        )
        circular = options.get("padding_mode") == "circular"
        dilation = options.get("dilation", 1)
        h = nn.functional.pad(h, [dilation] * 4, mode="circular" if circular else "constant")
        phi.append(nn.functional.unfold(h, 3, dilation=dilation).transpose(1, 2).flatten(0, 1))
        y.append(getattr(b, target).flatten())
    phi, y = torch.cat(phi).double().detach(), torch.cat(y).double()
    if options.get("bias", True):
        phi = torch.cat([phi, torch.ones(len(phi), 1)], 1)
    dense = torch.linalg.lstsq(phi, y[:, None]).solution
    torch.testing.assert_close(solution, dense, rtol=1e-5, atol=1e-7)
    # what the sums say of the error is the error
    each = torch.stack([(phi @ dense - y[:, None])[:, 0].square().view(6, -1)[b::3].mean() for b in range(3)])
    torch.testing.assert_close(moments.errors(solution), each, rtol=1e-6, atol=0)
    # and what is written into the layer gives it
    readout.write_rows(after.network.last, rows, solution)
    raw = torch.cat([after.raw(a := _x_t(b), b.t, SCHEDULE.level(b.t).like(a)) for b in batches])
    torch.testing.assert_close(raw[:, new].flatten().double(), (phi @ dense).flatten(), rtol=1e-4, atol=1e-5)


def _x_t(b: noised.Noised) -> Tensor:
    level = SCHEDULE.level(b.t).like(b.x0)
    return level.alpha * b.x0 + level.sigma * b.noise


@pytest.mark.parametrize(
    "last",
    [
        nn.ConvTranspose2d(3, 1, 3, padding=1),
        nn.ConvTranspose2d(3, 1, (3, 4), stride=(1, 2), padding=(2, 1), bias=False),
        nn.ConvTranspose2d(3, 1, 2, stride=3, output_padding=(2, 1), dilation=2, padding=(1, 4)),
    ],
    ids=str,
)
def test_the_closed_form_of_a_transposed_convolution(last: nn.ConvTranspose2d) -> None:
    network = nn.Conv2d(1, 3, 3, padding=1, bias=False).double()
    z = network(toy_batches(2, 1)[0].x0.double()).detach()
    phi = readout.patches(last, z, last.double()(z))
    # each feature by itself: the layer with one number in its weight
    alone = torch.zeros(phi.shape[-1], *last.weight.shape).flatten(1).double()
    alone[torch.arange(len(alone)), torch.arange(len(alone))] = 1
    options = {"stride": last.stride, "padding": last.padding, "dilation": last.dilation}
    options["output_padding"] = last.output_padding
    expected = [nn.functional.conv_transpose2d(z, w.view_as(last.weight), None, **options) for w in alone]
    assert torch.equal(phi, torch.stack([y.flatten(1) for y in expected], -1))


@pytest.mark.parametrize(
    ("options", "padded"),
    [
        ({"kernel_size": (3, 2), "stride": (1, 2), "dilation": (2, 1)}, None),
        ({"kernel_size": 3, "stride": 2, "padding": (1, 2)}, "constant"),
        ({"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"}, "reflect"),
    ],
    ids=str,
)
def test_what_enters_a_convolution_is_torchs_own_unfold(options, padded) -> None:
    z, layer = torch.randn(2, 3, 6, 7), nn.Conv2d(3, 1, **options)
    wide = z if padded is None else nn.functional.pad(z, (2, 2, 1, 1), mode=padded)
    sizes = layer.kernel_size, layer.dilation, 0, layer.stride
    expected = nn.functional.unfold(wide, *sizes).transpose(1, 2)  # type: ignore[arg-type]
    assert torch.equal(readout.patches(layer, z, layer(z)), expected)


def test_what_enters_a_linear_map_has_its_features_last() -> None:
    z, layer = torch.randn(2, 3, 4, 5), nn.Linear(5, 1)
    assert torch.equal(readout.patches(layer, z, layer(z)), z.view(2, 12, 5))


def test_the_closed_form_through_a_transposed_convolution() -> None:
    class Up(Toy):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            z = torch.tanh(self.features(x[..., ::2, ::2]) + 0.01 * t.view(-1, 1, 1, 1))
            return self.last(z, output_size=x.shape[2:])

    after = upgrade(Denoiser(Up(nn.ConvTranspose2d(3, 1, 3, stride=2, padding=1)), Epsilon(), SCHEDULE))
    batches = toy_batches(12, size=6)
    moments, rows = readout.collect(after, "last", slice(1, 2), batches, 3)
    readout.write_rows(after.network.last, rows, solution := moments.solve(ridge=0.0))
    with torch.no_grad():
        errors = [(after(_x_t(b), b.t).parts["x0"] - b.x0).double().square().mean() for b in batches if b.bin == 1]
    torch.testing.assert_close(torch.stack(errors).mean(), moments.errors(solution)[1], rtol=1e-4, atol=0)
    assert moments.errors(solution)[1] < torch.cat([b.x0 for b in batches if b.bin == 1]).square().mean()


def test_the_closed_form_finds_its_way_through_patches() -> None:
    from diffusers import DiTTransformer2DModel

    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=2, out_channels=2, num_layers=1, sample_size=8,
        patch_size=2, norm_num_groups=1, num_embeds_ada_norm=200,
    )  # fmt: skip
    nn.init.normal_(network.proj_out_1.weight, std=0.2)
    x0 = dualout.noise(range(16), (2, 8, 8)).tanh()
    eps, t = dualout.noise(range(50, 66), (2, 8, 8)), torch.arange(16) * 12
    told = {"class_labels": torch.zeros(16, dtype=torch.long)}
    batch = noised.Noised(0, x0, t, eps, told)
    level = SCHEDULE.level(t).like(x0)
    x_t = level.alpha * x0 + level.sigma * eps
    after = upgrade(Denoiser(network.eval(), Epsilon(), SCHEDULE), example=(x_t, t, told)).eval()
    moments, rows = readout.collect(after, "proj_out_2", slice(2, 4), [batch], 1)
    # four pixels a patch, two new channels each
    assert len(rows) == 8
    solution = moments.solve(ridge=0.0)
    readout.write_rows(after.network.proj_out_2, rows, solution)
    with torch.no_grad():
        error = (after(x_t, t, **told).parts["x0"] - x0).double().square().mean()
        assert torch.equal(after(x_t, t, **told).x0, Denoiser(network, Epsilon(), SCHEDULE)(x_t, t, **told).x0)
    torch.testing.assert_close(error, moments.errors(solution)[0], rtol=1e-4, atol=0)
    assert error < x0.square().mean()


def test_conditions_need_not_have_a_row_an_image() -> None:
    class Positioned(Toy):
        def forward(self, x: Tensor, t: Tensor, rows: Tensor, strength: float) -> Tensor:
            return super().forward(x + strength * rows.view(-1, 1), t)

    told = {"rows": torch.linspace(0, 1, 5), "strength": 0.5}
    batches = [batch._replace(conditions=told) for batch in toy_batches()]
    network, example = Positioned(nn.Conv2d(3, 1, 3, padding=1)), (batches[0].x0, batches[0].t, told)
    after = upgrade(Denoiser(network, Epsilon(), SCHEDULE), example=example)
    moments, rows = readout.collect(after, "last", slice(1, 2), batches, 3)
    readout.write_rows(after.network.last, rows, solution := moments.solve(ridge=0.0))
    with torch.no_grad():
        errors = [
            (after(_x_t(b), b.t, **told).parts["x0"] - b.x0).double().square().mean() for b in batches if b.bin == 0
        ]
    torch.testing.assert_close(torch.stack(errors).mean(), moments.errors(solution)[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "more",
    [
        lambda y: 1.5 * y,
        lambda y: y + 0.5,
        lambda y: -y,
        # of other images, or one number in several places
        lambda y: y.flip(0),
        lambda y: y[..., :1].expand_as(y),
    ],
    ids=["scaled", "shifted", "negative", "mixed", "repeated"],
)
def test_what_is_no_rearrangement_is_refused(more) -> None:
    class Changed(Toy):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return more(super().forward(x, t))

    after = upgrade(Denoiser(Changed(nn.Conv2d(3, 1, 3, padding=1)), Epsilon(), SCHEDULE), layer="last")
    with pytest.raises(InputError, match="more than rearrange"):
        readout.collect(after, "last", slice(1, 2), toy_batches(), 3)


def test_large_images_are_found_their_way_through_too() -> None:
    after = upgrade(Denoiser(Toy(nn.Conv2d(3, 1, 1)), Epsilon(), SCHEDULE))
    # of 2·96² numbers and more the last lie beyond 128²
    (batch,) = toy_batches(1, size=96)
    moments, rows = readout.collect(after, "last", slice(1, 2), [batch], 3)
    assert rows.tolist() == [1]
    h = torch.tanh(after.network.features(_x_t(batch)) + 0.01 * batch.t.view(-1, 1, 1, 1)).double()
    torch.testing.assert_close(moments.cross[0, :3, 0], (h * batch.x0).sum((0, 2, 3)), rtol=1e-5, atol=1e-3)


def test_of_many_positions_some_may_be_looked_at() -> None:
    after = upgrade(Denoiser(Toy(nn.Conv2d(3, 1, 1)), Epsilon(), SCHEDULE))

    def sums(**some: int) -> readout.Moments:
        return readout.collect(after, "last", slice(1, 2), toy_batches(), 3, **some)[0]

    every, few = sums(), sums(pixels=10)
    # of each bin two batches of four images, of 5×5 positions
    assert every.count.tolist() == [200.0] * 3
    assert few.count.tolist() == [80.0] * 3
    assert torch.equal(few.gram, sums(pixels=10).gram)
    assert not torch.equal(few.gram, sums(pixels=10, seed=1).gram)
    assert torch.equal(every.gram, sums(pixels=25).gram)


def test_blended_weights_lower_the_blends_error() -> None:
    after = upgrade(Denoiser(Toy(nn.Conv2d(3, 1, 3, padding=1)), Epsilon(), SCHEDULE))
    moments, _ = readout.collect(after, "last", slice(1, 2), toy_batches(30, 3), 3)
    old = torch.tensor([1e-3, 0.3, 30.0], dtype=torch.float64)

    def blended(rows: Tensor) -> float:
        new = moments.errors(rows)
        return float((old * new / (old + new)).log().sum())

    assert blended(moments.solve_blended(old)) <= blended(moments.solve()) + 1e-9


def unequal_moments() -> tuple[readout.Moments, list[Tensor], list[Tensor]]:
    """Of three bins, of which more and more was seen, and what was."""
    moments = readout.Moments.none(3, 4, 2, CPU)
    phi = [torch.randn(n, 4, dtype=torch.float64) for n in (10, 40, 90)]
    y = [torch.randn(len(x), 2, dtype=torch.float64) + b * x[:, :2] for b, x in enumerate(phi)]
    for b in range(3):
        moments.add(b, phi[b], y[b])
    return moments, phi, y


@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 3.0]])
def test_a_bin_counts_by_its_weight_however_much_of_it_was_seen(weights) -> None:
    moments, phi, y = unequal_moments()
    w = torch.ones(3).double() if weights is None else torch.tensor(weights, dtype=torch.float64)
    root = torch.cat([(w[b] / len(phi[b])).sqrt().expand(len(phi[b]), 1) for b in range(3)])
    dense = torch.linalg.lstsq(root * torch.cat(phi), root * torch.cat(y)).solution
    torch.testing.assert_close(moments.solve(None if weights is None else w, ridge=0.0), dense)
    errors = torch.stack([(a @ dense - b).square().mean() for a, b in zip(phi, y, strict=True)])
    torch.testing.assert_close(moments.errors(dense), errors)


def test_the_ridge_is_a_share_of_the_features_mean_square_and_holds_rows_back() -> None:
    moments = readout.Moments.none(1, 2, 1, CPU)
    phi, y = torch.diag(torch.tensor([1.0, 3.0])).double(), torch.tensor([[2.0], [6.0]]).double()
    moments.add(0, phi, y)
    # of 1 and 9, which are halved as two were seen, the mean is 2.5
    torch.testing.assert_close(moments.solve(ridge=0.2), torch.tensor([[1 / (0.5 + 0.5)], [9 / (4.5 + 0.5)]]).double())


def test_blended_weights_find_where_the_blends_error_is_least() -> None:
    moments, phi, y = unequal_moments()
    old = torch.tensor([1e-2, 0.3, 3.0], dtype=torch.float64)

    def slope(rows: Tensor) -> Tensor:
        rows = rows.clone().requires_grad_()
        new = torch.stack([(a @ rows - b).square().mean() for a, b in zip(phi, y, strict=True)])
        (old * new / (old + new)).log().sum().backward()
        assert rows.grad is not None
        return rows.grad.abs().max()

    plain = slope(moments.solve())
    assert slope(moments.solve_blended(old)) < 0.1 * plain
    assert slope(moments.solve_blended(old, rounds=200)) < 1e-6 * plain


def test_features_that_depend_on_each_other_are_solved() -> None:
    for _ in range(8):
        moments = readout.Moments.none(1, 3, 1, CPU)
        phi = torch.randn(50, 2, dtype=torch.float64) @ torch.tensor([[1.0, 0, 1], [0, 1, 1]], dtype=torch.float64)
        y = phi @ torch.tensor([[1.0], [2.0], [0.5]], dtype=torch.float64)
        moments.add(0, phi, y)
        # not below 0 by rounding either
        assert 0 <= moments.errors(moments.solve(ridge=0.0))[0] < 1e-12


def test_a_feature_that_is_never_there_has_no_part_in_the_shortest_solution() -> None:
    # no Cholesky factor: that row of Σ φφᵀ is zero
    moments = readout.Moments.none(3, 4, 2, CPU)
    phi, y = torch.randn(40, 4, dtype=torch.float64), torch.randn(40, 2, dtype=torch.float64)
    phi[:, 1] = 0
    phi[:, 3] = 2 * phi[:, 0]
    moments.add(0, phi[:20], y[:20])
    moments.add(2, phi[20:], y[20:])
    solution = moments.solve(ridge=0.0)
    torch.testing.assert_close(solution, torch.linalg.pinv(phi) @ y, rtol=1e-6, atol=1e-9)
    # nor has a bin of which nothing was seen
    assert moments.errors(solution)[1] == 0


# where the gate opens


def errors_of(eps: Tensor, x0: Tensor) -> opening.Errors:
    """From the two routes' errors, (bins, images, pixels)."""
    step = eps - x0
    return opening.Errors(eps.square().mean(2), (eps * step).mean(2), step.square().mean(2))


def test_the_blends_error_and_best_ratio_are_those_written_out() -> None:
    a, b = torch.randn(2, 3, 8, 20, dtype=torch.float64)
    errors = errors_of(a, 2 * b)
    for r in (0.0, 0.3, 1.0):
        torch.testing.assert_close(errors.of(r), ((1 - r) * a + r * 2 * b).square().mean(2))
    best = errors.best(slice(None))
    least = errors.of(best).mean(1)
    for r in np.linspace(0, 1, 101):
        assert (errors.of(float(r)).mean(1) >= least - 1e-12).all()
    # no further than either route: half of an error, or more than all, or no difference at all
    for x0, ratio in ((0.5 * a, 1.0), (2.0 * a, 0.0), (a, 0.0)):
        assert (errors_of(a, x0).best(slice(None)) == ratio).all()


@pytest.mark.parametrize("closed", [0.0, 1.0])
def test_the_gate_never_opens_where_the_new_route_does_not_help(closed) -> None:
    generator = torch.Generator().manual_seed(1)
    good = torch.randn(200, 64, 30, generator=generator, dtype=torch.float64)
    worse = good + torch.randn(200, 64, 30, generator=generator, dtype=torch.float64)
    # the new route is the trained one with more noise, so that every blend errs more
    eps, x0 = (good, worse) if closed == 0 else (worse, good)
    assert sum(r != closed for r in opening.opened(errors_of(eps, x0), closed)) == 0
    # an exact route needs no help, and a copy gives none
    assert opening.opened(errors_of(good * 0, good), 0.0) == [0.0] * 200
    assert opening.opened(errors_of(good, good), closed) == [closed] * 200


@pytest.mark.parametrize("helped", [0, 1])
def test_what_helps_every_other_image_only_is_taken_for_chance(helped) -> None:
    good, bad = torch.ones(1, 60, 4, dtype=torch.float64), torch.full((1, 60, 4), 2.0, dtype=torch.float64)
    trained, new = good.clone(), bad.clone()
    trained[:, helped::2], new[:, helped::2] = 10.0, 0.0
    assert opening.opened(errors_of(trained, new), 0.0) == [0.0]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(("other", "ratio"), [(-9.0, 0.0), (-0.5, 2.5 / 3.25)])
def test_a_ratio_has_to_help_images_that_it_was_not_found_with(other, ratio, first) -> None:
    # the trained route errs by 1; half of the images want all of the new one, the others 1 / 10 or 2 / 3 of it
    trained = torch.ones(1, 60, 4, dtype=torch.float64)
    new = torch.zeros_like(trained)
    new[:, first::2] = other
    # at 1 the others err by 81 or 1 / 4; what both are given follows from all
    assert opening.opened(errors_of(trained, new), 0.0) == [pytest.approx(ratio)]


@pytest.mark.parametrize(("there", "opens"), [(0.0, True), (3.0, False)])
def test_one_time_steps_error_does_not_hide_what_helps_all_others(there, opens) -> None:
    # as at the end of a cosine schedule: of 64 images two, one in each half, are at a time step that errs far more
    generator = torch.Generator().manual_seed(1)
    trained, new = torch.randn(2, 1, 64, 50, generator=generator, dtype=torch.float64)
    trained[:, :2] *= 1e3
    new = torch.cat([there * trained[:, :2], 0.5 * new[:, 2:]], 1)
    assert (opening.opened(errors_of(trained, new), 0.0) != [0.0]) == opens


@pytest.mark.parametrize(("helped", "opens"), [(3, False), (4, True)])
def test_the_gate_opens_beyond_two_standard_errors(helped, opens) -> None:
    # what helps k of n images by as much lies √(k·(n − 1) / (n − k)) standard errors from none, n in each half
    trained = torch.zeros(1, 200, 4, dtype=torch.float64)
    trained[:, : 2 * helped] = 1.0
    assert (helped * 99 / (100 - helped)) ** 0.5 == pytest.approx(2, abs=0.3)
    assert opening.opened(errors_of(trained, 0 * trained), 0.0) == [float(opens)]
    assert opening.opened(errors_of(0 * trained, trained), 1.0) == [1.0 - opens]


def test_the_gate_opens_at_the_optimum_where_it_helps() -> None:
    a, b = torch.randn(2, 5, 200, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = torch.tensor([0.2, 0.5, 1.0, 2.0, 100.0], dtype=torch.float64).view(-1, 1, 1)
    ratios = opening.opened(errors_of(scale * a, b), 0.0)
    # independent errors: inverse-variance weighting
    expected = (scale**2 / (scale**2 + 1)).flatten()
    torch.testing.assert_close(torch.tensor(ratios, dtype=torch.float64), expected, rtol=0, atol=0.03)


def test_the_table_is_exact_where_the_gate_is_closed_and_can_learn_where_it_is_open() -> None:
    for closed in (0.0, 1.0):
        ratios = opening.table([closed, 0.25, 1 - closed], 10, closed).sigmoid()
        assert (ratios[:3] == closed).all()
        torch.testing.assert_close(ratios[3:7], torch.full((4,), 0.25))
        assert ((ratios[7:] > 0) & (ratios[7:] < 1)).all()
        torch.testing.assert_close(ratios[7:], torch.full((3,), 1 - closed), rtol=0, atol=1e-5)


@SOURCE
def test_an_opened_gate_blends_where_it_is_open_and_nowhere_else(source, tmp_path) -> None:
    before = trained(source)
    after = upgrade(before)
    layer = after.network.get_submodule(output_layer(after.network))
    with torch.no_grad():
        layer.weight[new_rows(after)[:1]] = 0.1
    closed = upgraded_of(after).closed
    opened = open_gate(after, [closed, 0.25])
    opened.save_pretrained(tmp_path / "open")
    for d in (opened, Denoiser.from_pretrained(tmp_path / "open")):
        x = noises()
        with torch.no_grad():
            assert torch.equal(d(x, 50).x0, before(x, 50).x0)
            p = d(x, 150)
            torch.testing.assert_close(p.x0, d.route(0.25)(x, 150).x0, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(d.route(closed)(x, 150).x0, before(x, 150).x0, rtol=0, atol=0)
            assert not torch.equal(p.x0, before(x, 150).x0)
    assert open_gate(after, [closed, closed]) is after
    with pytest.raises(InputError, match="this is not an upgraded model, but one of"):
        upgraded_of(before)
    assert gate_logits(opened).shape == (200,)


def test_the_standard_error_of_two_is_half_of_what_is_between_them() -> None:
    assert opening.standard_error(torch.tensor([[0.0, 2.0], [1.0, 1.0]])).tolist() == [1.0, 0.0]


def test_worse_and_score() -> None:
    before = torch.rand(4, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    now = before * torch.tensor([0.5, 1.0, 1.001, 1.5], dtype=torch.float64)[:, None]
    assert opening.worse(now, before) == [2, 3]
    # by half and by a tenth of a per cent more than is tolerated
    assert opening.worse(now, before, 0.0005) == [2, 3]
    assert opening.worse(now, before, 0.0011) == [3]
    # the same numbers, rounded differently
    assert opening.worse(before * (1 + 1e-13), before) == []
    # by two and a half and by three and a half standard errors
    around = torch.ones(2, 100, dtype=torch.float64)
    around[:, ::2] = -1
    more = around + torch.tensor([[0.25], [0.35]], dtype=torch.float64)
    assert opening.worse(before[:2] + more, before[:2]) == [1]
    assert opening.score(now, before) == pytest.approx((math.log(0.5) + math.log(1.001) + math.log(1.5)) / 4)
    # of the mean error in each bin, not of each image's
    some = torch.tensor([[1.0, 3.0], [2.0, 2.0]], dtype=torch.float64)
    assert opening.score(some, torch.tensor([[2.0, 2.0], [1.0, 1.0]]).double()) == pytest.approx(math.log(2) / 2)


@pytest.mark.parametrize("closed", [0.0, 1.0])
def test_a_look_says_where_the_gate_opens_and_what_each_route_errs_by(closed) -> None:
    generator = torch.Generator().manual_seed(0)
    trained, new = torch.randn(2, 2, 100, 30, generator=generator, dtype=torch.float64)
    new[0] += trained[0]  # no help
    eps, x0 = (trained, new) if closed == 0 else (new, trained)
    errors, before = errors_of(eps, x0), 2 * trained.square().mean(2)
    found = opening.look(errors, before, closed, 9)
    assert [(row["t"], row["open"]) for row in found.rows] == [("0–3", False), ("4–8", True)]
    for row, ratio, a, b, old in zip(found.rows, found.ratios, eps, x0, before, strict=True):
        assert row["ratio"] == ratio
        told = a.square().mean(), b.square().mean(), ((1 - ratio) * a + ratio * b).square().mean(), old.mean()
        assert [row[name] for name in ("eps", "x0", "after", "before")] == pytest.approx([float(v) for v in told])
    assert found.ratios == [closed, pytest.approx(0.5, abs=0.05)]
    assert found.score == pytest.approx(sum(math.log(r["after"] / r["before"]) for r in found.rows) / 2)
    assert opening.look(errors, before, closed, 9, shut=True).ratios == [closed] * 2


def test_measured_errors_are_those_of_the_routes() -> None:
    after = upgrade(trained(Velocity()))
    with torch.no_grad():
        # a new route that says something
        after.network.get_submodule(output_layer(after.network)).weight[new_rows(after)] = 0.1
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    stream = noised.Stream(Dataset("x", images, "nhw"), np.arange(20), noised.Bins(200, 4, 0), CPU)
    errors = opening.measure(after, stream, 4)
    assert errors.eps.shape == (4, 20)
    for b, batch in enumerate(stream):
        assert batch.bin == b
        assert ((batch.t >= 50 * b) & (batch.t < 50 * (b + 1))).all()
        for ratio in (0.0, 0.4, 1.0):
            p = after.route(ratio)(_x_t(batch), batch.t)
            error = (p.x0 - batch.x0).double().square().flatten(1).mean(1)
            torch.testing.assert_close(errors.of(ratio)[b], error, rtol=1e-5, atol=0)
    again = opening.measure(after, stream, 4)
    assert torch.equal(again.along, errors.along)


def test_small_errors_of_the_new_route_are_found_beside_large_ones_of_the_old() -> None:
    # one that is nearly right where the old one is far off, as eps is at high noise: a difference of large numbers
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8)
    (batch,) = noised.Stream(Dataset("x", images, "nhw"), np.arange(4), noised.Bins(200, 1, 0), CPU)
    batch = batch._replace(t=torch.full((4,), 199))
    off = 1e-3 * dualout.noise(range(4), (1, 8, 8))
    raw = torch.cat([torch.zeros_like(off), batch.x0 + off, torch.zeros_like(off)], 1)
    found = opening.measure(Denoiser(lambda *_: raw, Upgraded(), SCHEDULE), [batch], 1)
    assert (found.of(0.0) > 1000).all()
    expected = (batch.x0 + off - batch.x0).double().square().flatten(1).mean(1)
    torch.testing.assert_close(found.of(1.0)[0], expected, rtol=1e-5, atol=0)


def test_times_and_noise_are_an_images_own_in_each_bin() -> None:
    x0, rows = torch.zeros(2000, 1, 2, 2), np.arange(2000)

    def draw(bin: int | np.ndarray = 0, some: slice = slice(None), number: int = 0, seed: int = 0) -> noised.Noised:
        return noised.Bins(10, 2, seed).draw(bin, x0[some], rows[some], number, {})

    batch = draw()
    # every time of the bin as often
    assert batch.t.bincount().tolist() == pytest.approx([400] * 5, abs=100)
    assert set(draw(1).t.tolist()) == {5, 6, 7, 8, 9}
    # not of its batch, and each in the bin that is asked for
    part = draw(some=slice(30, 40))
    assert torch.equal(part.t, batch.t[30:40])
    assert torch.equal(part.noise, batch.noise[30:40])
    mixed = draw(rows % 2)
    assert torch.equal(mixed.t >= 5, torch.from_numpy(rows % 2 == 1))
    assert torch.equal(mixed.t[::2], batch.t[::2])
    for other in (draw(number=1), draw(seed=1)):
        assert not torch.equal(other.t, batch.t)
        assert not (other.noise == batch.noise).any()


def test_an_order_is_of_all_and_follows_the_seed() -> None:
    first, again, other = (noised.shuffled(50, seed).tolist() for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(first) == sorted(other) == list(range(50)) != first


@pytest.mark.parametrize(("images", "size"), [(1280, 64), (256, 12), (20, 1), (7, 1)])
def test_few_images_are_spread_over_all_bins(images: int, size: int) -> None:
    data = Dataset("x", np.zeros((images, 2, 2), np.uint8), "nhw")
    stream = noised.Stream(data, np.arange(images), noised.Bins(200, 20, 0), CPU, each=False)
    batches = list(stream)
    assert {b.bin for b in batches} == set(range(min(images, 20)))
    assert max(len(b.x0) for b in batches) == size
    assert sum(len(b.x0) for b in batches) == images
    assert len(stream) == len(batches)


@pytest.mark.parametrize("each", [True, False])
def test_the_images_that_are_looked_at(each) -> None:
    images = np.arange(20, dtype=np.uint8).repeat(64).reshape(20, 8, 8)
    dataset = Dataset("x", images, "nhw", labels=torch.arange(20) % 5, classes=tuple("abcde"))
    rows = np.array([7, 0, 3, 19, 12, 5, 8])
    stream = noised.Stream(dataset, rows, noised.Bins(200, 2, 0), CPU, conditional=True, each=each, batch_size=3)
    seen = [(b.bin, ((b.x0[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()) for b in stream]
    blocks = [[7, 0, 3], [19, 12, 5], [8]]
    assert seen == (
        [(b, rows) for b in (0, 1) for rows in blocks] if each else list(zip([0, 1, 0], blocks, strict=True))
    )
    assert len(stream) == len(seen)
    for batch, (b, rows) in zip(stream, seen, strict=True):
        assert batch.conditions["class_labels"].tolist() == [row % 5 for row in rows]
        assert ((batch.t >= 100 * b) & (batch.t < 100 * (b + 1))).all()
    # other noise each time that an image is looked at, and no classes for a network that is told none
    looks = [noise for batch in stream for noise in batch.noise]
    assert len(torch.stack(looks).unique(dim=0)) == len(looks)
    assert not any(b.conditions for b in noised.Stream(dataset, np.arange(20), noised.Bins(200, 2, 0), CPU))


# what is trained


def test_scopes() -> None:
    denoiser = upgrade(trained(Epsilon()))
    example = (noises(2), torch.tensor([3, 9]))
    assert set_scope(denoiser, "rows", example) == 2 * (8 * 9 + 1)
    assert [n for n, p in denoiser.named_parameters() if p.requires_grad] == [
        "network.conv_out.weight",
        "network.conv_out.bias",
    ]
    network = denoiser.network
    assert last_block(network, "conv_out", example) == ["up_blocks.1", "conv_norm_out", "conv_out"]
    denoiser = upgrade(trained(Epsilon()))
    set_scope(denoiser, "last", example)
    chosen = {n.split(".")[1] for n, p in denoiser.named_parameters() if p.requires_grad}
    assert chosen == {"up_blocks", "conv_norm_out", "conv_out"}
    assert not any(p.requires_grad for p in denoiser.network.up_blocks[0].parameters())
    denoiser = upgrade(trained(Epsilon()))
    assert set_scope(denoiser, "all", example) == sum(p.numel() for p in denoiser.parameters())
    with pytest.raises(InputError, match="did you mean 'rows'"):
        set_scope(denoiser, "row", example)


def test_rows_of_a_transposed_convolution_are_trained_alone() -> None:
    denoiser = upgrade(Denoiser(Toy(nn.ConvTranspose2d(3, 1, 3, padding=1)), Epsilon(), SCHEDULE))
    batch = toy_batches(1)[0]
    assert set_scope(denoiser, "rows", (batch.x0, batch.t)) == 2 * (3 * 9 + 1)
    denoiser.route(0.5).loss(batch.x0, batch.t, batch.noise).total.backward()
    last = denoiser.network.last
    assert not last.weight.grad[:, 0].any()
    assert last.weight.grad[:, 1].all()
    assert not last.bias.grad[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_the_rows_that_are_there_already_none_is_trained(dtype) -> None:
    denoiser = upgrade(trained(Epsilon(), 3).to(dtype))
    set_scope(denoiser, "rows", (noises(2, 3), torch.tensor([3, 9])))
    denoiser.network(torch.randn(2, 3, 8, 8, dtype=dtype), torch.tensor([3, 9])).sample.sum().backward()
    for p in (denoiser.network.conv_out.weight, denoiser.network.conv_out.bias):
        assert p.grad.dtype == dtype
        assert p.grad.reshape(7, -1).any(1).tolist() == [False] * 3 + [True] * 4


def test_where_no_block_has_a_number_the_part_that_runs_last_is_trained() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Toy(nn.Conv2d(3, 1, 1))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.body(x, t)

    assert last_block(Wrapped(), "body.last", (noises(2), torch.tensor([3, 9]))) == ["body.last", "body"]


def test_what_the_original_kept_fixed_stays_so() -> None:
    source = trained(Epsilon())
    source.network.conv_in.weight.requires_grad_(False)
    denoiser = upgrade(source)
    set_scope(denoiser, "all", (noises(2), torch.tensor([3, 9])))
    assert not denoiser.network.conv_in.weight.requires_grad
    assert denoiser.network.conv_in.bias.requires_grad


def test_an_upgrade_leaves_the_mode_of_the_network_as_it_is() -> None:
    source = trained(Epsilon())
    source.training = True  # as of a denoiser that was just made around a network in evaluation mode
    source.network.eval()  # type: ignore[union-attr]
    opened = open_gate(upgrade(source), [0.5, 0.5])
    assert opened.training
    assert not any(module.training for module in opened.network.modules())  # type: ignore[union-attr]


def test_a_fresh_open_gate_starts_as_velocity() -> None:
    p = Upgraded(ratio="pixel")
    raw, x = torch.randn(2, 3, 4, 4), torch.randn(2, 1, 4, 4)
    raw[:, 2] = 0
    one = Denoiser(lambda x, t: raw, p, SCHEDULE)
    torch.testing.assert_close(one(x, 70).x0, one.route("velocity")(x, 70).x0)


@pytest.mark.parametrize("gate", ["closed", "pixel"])
@pytest.mark.parametrize("base", [Epsilon(), CleanImage(), Velocity()], ids=lambda p: p.spec)
def test_the_new_output_is_taught_where_it_would_be_asked(base, gate) -> None:
    own = Upgraded(base=base, ratio=gate)
    network = build("tiny:width=8", 1, 8, own.channels(1))
    denoiser = Denoiser(network, own, SCHEDULE)
    new = "eps" if own.trained == "x0" else "x0"
    x0, noise, t = noises(4), dualout.noise(range(50, 54), (1, 8, 8)), torch.tensor([0, 40, 120, 199])
    found = denoiser.loss(x0, t, noise)
    alpha, sigma = SCHEDULE.level(t)
    ratio = (sigma**2 / (alpha**2 + sigma**2)).float()
    p = denoiser(alpha.view(-1, 1, 1, 1).float() * x0 + sigma.view(-1, 1, 1, 1).float() * noise, t)
    error = ((x0 if new == "x0" else noise) - p.parts[new]).square().flatten(1).mean(1)
    weight = (ratio if new == "x0" else 1 - ratio) ** 2
    torch.testing.assert_close(found.parts[new], error * weight, rtol=1e-4, atol=1e-7)
    assert ("mu" in found.parts) is (gate == "pixel")
    # the trained output's loss is the original's, whole
    alone = Denoiser(lambda *_: network(*_).sample[:, own.closed == 1 :][:, :1], base, SCHEDULE).loss(x0, t, noise)
    for name, values in alone.parts.items():
        torch.testing.assert_close(found.parts[name], values)


@pytest.mark.parametrize(("start", "forgets"), [("closed", False), ("zero", True)])
def test_the_average_forgets_its_first_weights_early_only_where_rows_begin_at_zero(start, forgets) -> None:
    assert UpgradeConfig(source="x", scope="all", start=start).training().ema_warmup is forgets
