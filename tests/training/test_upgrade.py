"""From one output to two: what must stay as it was, and what is trained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dualout
import oneconv
from dualout.denoiser import Denoiser
from dualout.errors import InputError
from dualout.networks import build
from dualout.parameterizations import (
    CleanImage,
    Dual,
    Epsilon,
    LearnedVariance,
    Parameterization,
    Upgraded,
    Velocity,
)
from dualout.samplers import DDIM, DDPM, DPMSolver
from dualout.training.upgrade import (
    last_block,
    open_gate,
    set_scope,
    upgrade,
    upgraded_of,
)
from dualout.training.upgrade_config import UpgradeConfig
from upgradable import SCHEDULE, SOURCE, Toy, draw, noises, toy_batches, trained


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
    with pytest.raises(InputError, match=r"gives 2 channels for images of 1, .* LearnedVariance\(Epsilon\(\)\)"):
        upgrade(Denoiser(network, Epsilon(), SCHEDULE))
    # of one without a configuration it is seen by its first layer, or by the example
    own = Told()
    own.out, example = nn.Conv2d(1, 2, 3, padding=1), (noises(), torch.tensor([1, 2, 3]), {"text": torch.zeros(3)})
    with pytest.raises(InputError, match="gives 2 channels for images of 1"):
        upgrade(Denoiser(own, Epsilon(), SCHEDULE), example=example)
    with pytest.raises(InputError, match="gives 4 channels for images of 2"):
        upgrade(Denoiser(oneconv.Net(4), Epsilon(), SCHEDULE))
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
