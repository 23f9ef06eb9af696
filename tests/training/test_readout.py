"""The new rows in closed form: least squares by hand, through whatever follows the layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dualout
from dualout.denoiser import Denoiser
from dualout.errors import InputError
from dualout.parameterizations import (
    CleanImage,
    Epsilon,
)
from dualout.training import noised, readout
from dualout.training.upgrade import (
    upgrade,
)
from upgradable import CPU, SCHEDULE, Toy, noisy, toy_batches


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
    raw = torch.cat([after.raw(a := noisy(b), b.t, SCHEDULE.level(b.t).like(a)) for b in batches])
    torch.testing.assert_close(raw[:, new].flatten().double(), (phi @ dense).flatten(), rtol=1e-4, atol=1e-5)


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
        errors = [(after(noisy(b), b.t).parts["x0"] - b.x0).double().square().mean() for b in batches if b.bin == 1]
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
            (after(noisy(b), b.t, **told).parts["x0"] - b.x0).double().square().mean() for b in batches if b.bin == 0
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
    h = torch.tanh(after.network.features(noisy(batch)) + 0.01 * batch.t.view(-1, 1, 1, 1)).double()
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
