"""The denoiser as an object of torch: copied, pickled, transformed, compiled, exported, made without memory."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from dualout.denoiser import Denoiser
from dualout.parameterizations import Dual, Epsilon, Parameterization
from dualout.samplers import DDIM
from dualout.schedules import Cosine, Linear
from oneconv import Net, T, images


def test_what_was_made_on_the_way_is_copied_and_pickled_whole() -> None:
    for moment in DDIM(steps=2).trajectory(Denoiser(Net(), Dual(), Cosine(T)), images()):
        for again in (pickle.loads(pickle.dumps(moment)), copy.deepcopy(moment), copy.copy(moment)):
            assert again.t == moment.t
            assert torch.equal(again.x_next, moment.x_next)
            assert torch.equal(again.prediction.eps, moment.prediction.eps)
            assert again.prediction.level.posterior == moment.prediction.level.posterior


@pytest.mark.parametrize("times", [None, torch.tensor([0, 7, 49])], ids=["trajectory", "times"])
def test_nothing_of_a_transformation_outlives_it(times: Tensor | None) -> None:
    # another alpha than other tests', of which numbers are kept too
    denoiser, x = Denoiser(Net(2), Epsilon(), Linear(T, 1.7e-4, 0.03)), images()

    def made(x: Tensor) -> Tensor:
        return DDIM(steps=3).sample(denoiser, x) if times is None else denoiser(x, times).x0

    torch.func.functionalize(made)(x)
    torch.func.jvp(made, (x,), (x,))
    again = pickle.loads(pickle.dumps(copy.deepcopy(denoiser)))
    assert torch.equal(again(x, 7).x0, denoiser(x, 7).x0)


def test_a_denoiser_is_compiled_whole_before_it_was_called() -> None:
    denoiser, x, t = Denoiser(Net(), Dual(), Cosine(T)), images(), torch.tensor([0, 7, 49])
    whole = torch.compile(lambda x, t: denoiser(x, t).x0, backend="eager", fullgraph=True)
    for times in (t, 7):
        torch.testing.assert_close(whole(x, times), denoiser(x, times).x0)


def test_a_denoiser_made_without_memory_is_filled_from_a_state() -> None:
    original, x = Denoiser(Net(), Dual(), Cosine(T)), images()
    with torch.device("meta"):
        made = Denoiser(Net(), Dual(), Cosine(T))
    made.to_empty(device="cpu")
    made.load_state_dict(original.state_dict())
    assert torch.equal(made.times, torch.arange(T))
    assert torch.equal(made(x, 3).x0, original(x, 3).x0)


def test_a_denoiser_is_exported_before_it_was_called() -> None:
    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.denoiser = Denoiser(Net(), Dual(), Cosine(T))

        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            return self.denoiser(x_t, t).x0

    model, given = Images(), (images(), torch.tensor([1, 20, 49]))
    exported = torch.export.export(model, given).module()
    torch.testing.assert_close(exported(*given), model(*given))


@pytest.mark.parametrize("parameterization", [Dual(), Epsilon()], ids=lambda p: p.spec)
def test_what_was_made_in_inference_mode_is_trained_on(parameterization: Parameterization) -> None:
    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.of_t, self.net = nn.Embedding(T, 1), Net(parameterization.channels(2))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            # both are kept for the backward pass
            return self.net(x + self.of_t(t).view(-1, 1, 1, 1), t)

    # a schedule whose numbers nothing else has used
    denoiser, x = Denoiser(Told(), parameterization, Cosine(T, offset=0.0123)), images()
    with torch.inference_mode():
        DDIM(steps=2).sample(denoiser.to("cpu"), x)
    for t in (*DDIM(steps=2).timesteps(denoiser.schedule), torch.tensor([1, 2, 3])):
        denoiser.loss(x, t, x).total.backward()
        denoiser(x, t).x0.sum().backward()
