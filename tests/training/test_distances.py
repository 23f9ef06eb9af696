"""What sampled and real images are compared by: distances in closed form, and the views that they are seen in."""

import math

import pytest
import torch

from dualout import Denoiser, Dual, Epsilon, schedules
from dualout.networks.build import build
from dualout.training.comparison import nearest
from dualout.training.distances import Energy, SlicedWasserstein, quantiles
from dualout.training.views import FLOOR, LOOKED_AT, Views, Within, whitening
from gaussian import SCHEDULE, exact


def test_a_batch_is_compared_with_all_real_images_at_its_own_ranks():
    ordered = torch.arange(8.0)[None]
    torch.testing.assert_close(quantiles(ordered, 8), ordered)
    torch.testing.assert_close(quantiles(ordered, 4), torch.tensor([[0.5, 2.5, 4.5, 6.5]]))
    torch.testing.assert_close(quantiles(ordered, 16)[:, :3], torch.tensor([[0.0, 0.25, 0.75]]))
    torch.testing.assert_close(quantiles(ordered, 16)[:, -3:], torch.tensor([[6.25, 6.75, 7.0]]))
    x, y = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).split(25)
    assert SlicedWasserstein()(x, y.repeat(2, 1), 0) == pytest.approx(float(SlicedWasserstein()(x, y, 0)), rel=0.2)


def test_random_directions_are_those_of_the_seed():
    x, y = torch.randn(2, 20, 9)
    few = SlicedWasserstein(directions=3)
    assert few(x, y, 5) == few(x, y, 5) != few(x, y, 6)


def test_gradients_of_the_distances_in_one_dimension_are_those_written_out():
    # nothing to turn: every rank is compared with the real one of that rank, and half of a point with each of two
    made = torch.tensor([[3.0], [1.0], [-2.0]], dtype=torch.float64, requires_grad=True)
    real = torch.tensor([[-3.0], [2.0], [2.5]], dtype=torch.float64)
    found = SlicedWasserstein(directions=4)(made, real, 0)
    assert found.item() == pytest.approx((0.5 + 1 + 1) / 3)
    (slope,) = torch.autograd.grad(found, made)
    assert slope.flatten().tolist() == pytest.approx([1 / 3, -1 / 3, 1 / 3])
    # 2·mean|x − y| falls or rises by 2/3 of how many y are on either side, the mean over pairs x, x' by 1/3 of each
    (slope,) = torch.autograd.grad(Energy()(made, real, 0), made)
    assert slope.flatten().tolist() == pytest.approx([2 / 3 - 2 / 3, -2 / 9, -2 / 9 + 2 / 3], abs=1e-6)


@pytest.mark.parametrize("dimensions", [1, 2, 8])
def test_the_sliced_distance_of_what_was_moved_is_the_mean_of_its_shadows(dimensions):
    # along a unit direction u everything moved by |u·v|, whose mean over all u is Γ(D/2) / (√π·Γ((D + 1)/2)) of |v|
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(n, dimensions, generator=generator, dtype=torch.float64) for n in (20, 1))
    share = math.gamma(dimensions / 2) / (math.pi**0.5 * math.gamma((dimensions + 1) / 2))
    found = SlicedWasserstein(directions=4000)(x + v, x, 0)
    assert float(found) == pytest.approx(share * float(v.norm()), rel=0.05 if dimensions > 1 else 1e-6)


def test_the_energy_distance_of_two_points_is_twice_that_between_them_in_units_of_a_feature():
    for dimensions in (1, 4, 9):
        made, real = torch.zeros(3, dimensions).double(), torch.full((5, dimensions), 0.7).double()
        assert float(Energy()(made, real, 0)) == pytest.approx(2 * 0.7, abs=1e-5)


def test_the_energy_distance_of_unequal_numbers_is_unbiased():
    generator = torch.Generator().manual_seed(0)
    found = torch.stack(
        [
            Energy()(torch.randn(8, 5, generator=generator), torch.randn(200, 5, generator=generator), 0)
            for _ in range(400)
        ]
    )
    assert abs(found.mean()) < 4 * found.std() / 20


def test_nearness_is_the_rms_distance_to_the_nearest_image():
    real = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])
    made = torch.stack([torch.full((1, 4, 4), 0.25), torch.full((1, 4, 4), 0.9)])
    assert nearest(made, real) == pytest.approx((0.25 + 0.1) / 2, rel=1e-5)
    assert nearest(real, real) == pytest.approx(0, abs=1e-6)


def test_views_are_whitened_where_images_vary():
    """Unit variance along every direction that holds variance; none is made of a direction that holds none."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([10.0, 3.0, 1.0, 1e-4])
    x = torch.randn(4000, 4, generator=generator) * spread @ torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
    # around any mean
    by = whitening(x + 5)
    variance = (x @ by).var(0)
    floor = FLOOR * spread.square().mean()
    torch.testing.assert_close(
        variance / variance[0], (u := spread.square() / (spread.square() + floor)) / u[0], rtol=0.1, atol=1e-6
    )
    assert float(variance.mean()) == pytest.approx(1, rel=1e-2)
    # fewer images than directions: the floor is a share of the mean over all of them
    corners = torch.zeros(4, 9)
    corners[:2, 0], corners[2:, 1] = torch.tensor([3.0, -3.0]), torch.tensor([1.0, -1.0])
    large, small = 6.0, 2 / 3
    floor = FLOOR * (large + small) / 9
    seen = (corners @ whitening(corners)).var(0)
    assert float(seen[1] / seen[0]) == pytest.approx(small / (small + floor) * (large + floor) / large, rel=1e-4)
    assert torch.isfinite(whitening(x[:3])).all()
    assert torch.isfinite(whitening(torch.ones(8, 5))).all()


def test_the_networks_own_features_are_those_of_its_bottom():
    denoiser = Denoiser(build("small:width=8", 1, (16, 16), 3), Dual(), schedules.Linear())
    within = Within.of(denoiser, torch.zeros(2, 1, 16, 16))
    assert within.layer == "mid_block"
    assert within.t == 48
    seen = []
    handle = denoiser.network.get_submodule(within.layer).register_forward_hook(
        lambda _, __, y: seen.append(y[0] if isinstance(y, tuple) else y)
    )
    images = torch.randn(3, 1, 16, 16)
    denoiser(within.alpha * images, within.t)
    handle.remove()
    assert seen[0][0, 0].numel() < 16 * 16
    # and nothing of what comes after is computed
    denoiser.network.get_submodule("up_blocks.0").register_forward_pre_hook(lambda *_: pytest.fail("went on"))
    assert torch.equal(within(images), seen[0].flatten(1))


def test_features_of_a_compiled_network_are_those_of_the_network():
    network, images = build("tiny:width=8", 1, (8, 8), 3), torch.randn(3, 1, 8, 8)
    compiled = Denoiser(torch.compile(network, backend="eager"), Dual(), SCHEDULE)
    within = Within.of(compiled, images)
    compiled(images, 5)  # compiled without a hook, so that none is asked
    assert torch.equal(within(images), Within.of(Denoiser(network, Dual(), SCHEDULE), images)(images))


@pytest.mark.parametrize("schedule", [SCHEDULE, schedules.RectifiedFlow()], ids=lambda s: s.name)
def test_the_network_is_asked_at_a_low_noise_level(schedule):
    within = Within(Denoiser(exact, Epsilon(), schedule), "")
    alpha, sigma = (float(table[within.t]) for table in schedule.tables())
    assert sigma / alpha == pytest.approx(LOOKED_AT, rel=0.02)
    assert within.alpha == pytest.approx(alpha)


def test_features_of_a_network_in_half_precision_are_compared_in_float32():
    denoiser = Denoiser(build("tiny:width=8", 1, (8, 8), 3).to(torch.bfloat16), Dual(), schedules.Linear())
    assert {view.dtype for view in Views(torch.randn(20, 1, 8, 8), 0, denoiser)(torch.zeros(2, 1, 8, 8))} == {
        torch.float32
    }


def test_pixels_are_seen_as_they_are_and_random_features_bend():
    images = torch.randn(2, 40, 1, 8, 8)
    a, b = images[:, :3]
    one, two, both = (Views(images[0], seed) for seed in (0, 1, 0))
    pixels, *bent = (x + y - z for x, y, z in zip(one(a), one(b), one(a + b), strict=True))
    torch.testing.assert_close(pixels, torch.zeros_like(pixels), rtol=0, atol=1e-4)
    assert all(float(rest.abs().mean()) > 0.1 for rest in bent)
    # and are those of the seed
    assert [torch.equal(x, y) for x, y in zip(one(a), two(a), strict=True)] == [True, False, False]
    assert all(torch.equal(x, y) for x, y in zip(one(a), both(a), strict=True))


def test_images_of_odd_sides_are_seen_to_their_edges():
    # halves are rounded up: 5×7 pixels are 3×4 squares, and 3×4 positions of the first convolution
    views = Views(torch.randn(600, 2, 5, 7), 0)(torch.randn(3, 2, 5, 7))
    assert [view.shape[1] for view in views] == [2 * 3 * 4, 32 * 2 * 2, 64 * 2 * 2]


def test_a_network_that_never_looks_from_afar_has_no_features_of_its_own():
    flat = Denoiser(torch.nn.Sequential(), Epsilon(), schedules.Linear())
    flat.network.forward = lambda x, t: x
    assert Within.of(flat, torch.zeros(2, 1, 8, 8)) is None


def test_views_of_real_images_have_unit_variance_and_pass_gradients():
    denoiser = Denoiser(build("tiny:width=8", 1, (8, 8), 3), Dual(), schedules.Linear()).requires_grad_(False)
    images = torch.randn(64, 1, 8, 8)
    views = Views(images, 0, denoiser)
    assert [float(v.var(0).mean()) for v in views(images)] == pytest.approx([1] * 4, rel=1e-3)
    images.requires_grad_()
    views(images)[3].square().sum().backward()
    assert images.grad.abs().sum() > 0
