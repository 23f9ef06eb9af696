"""Channels at another side, packed tokens, images beside, and flow's time: each against what it says it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dualout
from dualout.errors import InputError
from dualout.networks import (
    Adapter,
    ChannelsAt,
    Concatenated,
    FlowTime,
    Listed,
    SigmaConditioned,
    Tokens,
    Unshaped,
    build,
    widen,
)
from dualout.schedules import Linear, RectifiedFlow, Schedule

X, T = dualout.noise(range(2), (3, 4, 6)), torch.tensor([3, 700])


class Seen(nn.Module):
    """Gives its images back, and keeps what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[str, Any] = {}

    def forward(self, x: Tensor, t: Tensor, **told: Any) -> Tensor:
        self.told = {"x": x, "t": t, **told}
        return x


class Linears(nn.Module):
    """A linear map of the last side."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.body, self.out = nn.Linear(before, 8), nn.Linear(8, after)

    def forward(self, x: Tensor, t: Tensor, **told: Any) -> Tensor:
        return self.out(self.body(x).tanh())


class Idle(Seen):
    """Has a layer that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(3, 3)


@pytest.mark.parametrize("side", [2, 3, -1, 1])
def test_channels_are_where_the_network_has_them(side: int) -> None:
    network = Seen()
    assert torch.equal(ChannelsAt(network, side)(X, T), X)
    assert network.told["x"].shape[side] == 3
    assert torch.equal(network.told["x"].select(side, 1), X[:, 1])
    assert network.told["x"].is_contiguous()


@pytest.mark.parametrize("network", [ChannelsAt(Linears(3, 3), -1), Tokens(Linears(12, 12), 2, "none")])
def test_a_network_that_is_not_known_by_name_is_widened(network: Adapter) -> None:
    wide = widen(network, 7, example=(X, T))
    assert torch.equal(wide(X, T)[:, :3], network(X, T))
    assert not wide(X, T)[:, 3:].any()


@pytest.mark.parametrize("images", [X, dualout.noise(range(2), (3, 2, 4, 6))])
def test_tokens_are_patches_and_come_back(images: Tensor) -> None:
    network = Seen()
    assert torch.equal(Tokens(network, 2, "none")(images, T), images)
    tokens = network.told["x"]
    # the last token: each channel's lowest right patch, its pixels in a row
    torch.testing.assert_close(tokens[:, -1], images[..., -2:, -2:].flatten(3)[:, :, -1].flatten(1)
                               if images.ndim == 5 else images[..., -2:, -2:].flatten(1))  # fmt: skip
    assert tokens.shape == (2, images[0, 0].numel() // 4, 12)


def test_tokens_are_told_where_they_lie_unless_that_is_said() -> None:
    network, text = Seen(), torch.zeros(2, 5, 4)
    Tokens(network, 2)(X, T, encoder_hidden_states=text)
    assert network.told["img_ids"].tolist() == [[0, r, c] for r in range(2) for c in range(3)]
    assert network.told["txt_ids"].tolist() == [[0, 0, 0]] * 5
    Tokens(network, 2, axes=4)(X, T, encoder_hidden_states=text)
    assert network.told["img_ids"][-1].tolist() == [0, 1, 2, 0]
    assert network.told["txt_ids"][:, 3].tolist() == [0, 1, 2, 3, 4]
    mine = torch.ones(6, 3)
    Tokens(network, 2)(X, T, img_ids=mine)
    assert network.told["img_ids"] is mine
    Tokens(network, 2)(X, T)
    assert network.told["txt_ids"].shape == (0, 3)
    Tokens(network, 2, "shapes")(X, T)
    assert network.told["img_shapes"] == [[(1, 2, 3)]] * 2
    Tokens(network, 1, "sizes")(dualout.noise(range(2), (3, 2, 4, 6)), T)
    assert [network.told[k] for k in ("num_frames", "height", "width")] == [2, 4, 6]


def test_images_beside_follow_in_the_order_that_is_said() -> None:
    network, beside = Seen(), Concatenated(Seen(), ["mask", "image"])
    beside.network = network
    beside(X, T, image=X + 1, mask=X[:, :1], text="as it is")
    assert torch.equal(network.told["x"], torch.cat([X, X[:, :1], X + 1], 1))
    assert network.told["text"] == "as it is"
    # what enters the network has the noisy images' precision
    beside(X, T, image=X.double() + 1, mask=X[:, :1] > 0)
    assert network.told["x"].dtype == X.dtype
    with pytest.raises(InputError, match="sees image beside x_t"):
        beside(X, T, mask=X[:, :1])


def test_flow_is_told_its_place_on_the_line() -> None:
    schedule, network = RectifiedFlow(shift=3.0), Seen()
    sigma = schedule.tables()[1][T]
    FlowTime(network, schedule)(X, T)
    torch.testing.assert_close(network.told["t"].double(), 1000 * sigma, rtol=1e-6, atol=0)
    wide = torch.cat([X, X + 1], 1)
    backwards = FlowTime(lambda x, t: network(wide, t), schedule, 1.0, backwards=True)
    assert torch.equal(backwards(X, T), torch.cat([-X, X + 1], 1))
    torch.testing.assert_close(network.told["t"].double(), 1 - sigma, rtol=1e-6, atol=0)


def test_lists_of_images() -> None:
    def network(x: list[Tensor], t: Tensor, texts: list[Tensor]) -> tuple[list[Tensor]]:
        assert [image.shape for image in x] == [(3, 1, 4, 6)] * 2
        assert isinstance(texts, list)
        return ([image + text for image, text in zip(x, texts, strict=True)],)

    assert torch.equal(Listed(network, ["texts"])(X, T, texts=torch.ones(2, 1)), X + 1)
    one = X[:1, :1]
    assert torch.equal(Listed(lambda x, t: x)(one, T[:1]), one)
    for gives, got in ((lambda x, t: x[:1], "1 of them"), (lambda x, t: torch.stack(x), "Tensor")):
        with pytest.raises(InputError, match=f"a network of lists gives a list of 2 images; got {got}"):
            Listed(gives)(X, T)


@pytest.mark.parametrize("adapt", [FlowTime, SigmaConditioned])
def test_a_schedule_of_ones_own_may_have_tables_of_arrays(adapt: Any) -> None:
    class Own(Schedule):
        def tables(self) -> Any:
            s = np.linspace(0.1, 0.9, self.steps)
            return 1 - s, s

    network = Seen()
    adapt(network, Own(1000))(X, T)
    sigma = torch.linspace(0.1, 0.9, 1000, dtype=torch.float64)[T]
    expected = 1000 * sigma if adapt is FlowTime else sigma / (1 - sigma)
    torch.testing.assert_close(network.told["t"].double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", [lambda n: FlowTime(n, RectifiedFlow()), lambda n: SigmaConditioned(n, Linear())])
def test_an_adapter_made_without_memory_tells_the_network_what_it_should(make: Any) -> None:
    network = Seen()
    make(network)(X, T)
    expected = network.told["t"]
    with torch.device("meta"):
        made = make(network)
    made.to_empty(device="cpu")(X, T)
    assert torch.equal(network.told["t"], expected)


@pytest.mark.parametrize("make", [lambda n: FlowTime(n, RectifiedFlow()), lambda n: SigmaConditioned(n, Linear())])
def test_what_a_network_of_half_precision_is_told_is_as_precise(make: Any, tmp_path: Path) -> None:
    network = Seen()
    adapter = make(network)
    adapter(X, T)
    expected = network.told["t"]
    adapter.bfloat16()(X, T)
    assert torch.equal(network.told["t"], expected)
    saved = dualout.Denoiser(make(build("tiny", 3, 8, 3)).bfloat16(), dualout.Flow(), adapter.schedule)
    saved.save_pretrained(tmp_path)
    loaded = dualout.Denoiser.from_pretrained(tmp_path)
    assert next(loaded.network.parameters()).dtype == torch.bfloat16  # type: ignore[union-attr]
    assert all(b.dtype == torch.float32 for b in loaded.network.buffers(recurse=False))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: ChannelsAt(Seen(), 0), "side is a whole number"),
        (lambda: ChannelsAt(Seen(), 4)(X, T), "have no side 4"),
        (lambda: ChannelsAt(Seen(), -4)(X, T), "have no side -4"),
        (lambda: Tokens(Seen(), 0), "patch is a whole number"),
        (lambda: Tokens(Seen(), 2, "where"), "places is one of ids, shapes, sizes, none"),
        (lambda: Tokens(Seen(), 4)(X, T), "multiples of its patch, 4 pixels; got .2, 3, 4, 6"),
        (lambda: Tokens(lambda x, t: x[:, :4], 2, "none")(X, T), "a network of 6 tokens gives as many"),
        (lambda: Tokens(lambda x, t: x[..., None], 2, "none")(X, T), "a network of 6 tokens gives as many"),
        (lambda: Concatenated(Seen(), "mask"), "conditions is a list of names"),
        (lambda: Listed(Seen(), "texts"), "conditions is a list of names"),
        (lambda: Listed(lambda x, t: x[0])(X, T), "gives a list of 2 images"),
        (lambda: Unshaped(Seen(), "proj_out", 2), "this Seen has no layer 'proj_out'"),
        (lambda: Unshaped(Seen(), "", 0), "patch is a whole number"),
        (lambda: Unshaped(build("tiny", 3, 8, 3), "conv_out", 1)(X, T), "a network of 24 tokens gives as many"),
        (lambda: Unshaped(Idle(), "out", 1)(X, T), "'out' is called 0 times"),
    ],
)
def test_mistakes_are_said(wrong: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        wrong()
