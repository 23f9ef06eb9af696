"""smalldiffusion: `samples` and `training_loop`, around a network of discrete steps wrapped as in its examples."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from machine import installed
from torch import Tensor, nn

from dualout.schedules import Linear

NAME = "smalldiffusion"
_library: Any = None


def load() -> None:
    global _library
    import smalldiffusion
    import smalldiffusion.diffusion

    # its progress bar cannot be switched off
    smalldiffusion.diffusion.tqdm = lambda iterable, **_: iterable
    _library = smalldiffusion


def version() -> str:
    return installed(NAME) or "?"


def _wrapped(network: nn.Module, shape: tuple[int, ...]) -> Any:
    class Model(nn.Module, _library.ModelMixin):
        """Scales images to unit variance and finds the step of a noise level, as examples/diffusers_wrapper.py does."""

        input_dims = shape

        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.register_buffer("signal", Linear().level(torch.arange(1000)).alpha.float().square().flip(0))

        def forward(self, x: Tensor, sigma: Tensor, cond: None = None) -> Tensor:
            signal = 1 / (sigma**2 + 1)
            t = 999 - torch.searchsorted(self.signal, signal).clamp(max=999)
            return self.network(x * signal.sqrt(), t.flatten().expand(len(x)))

    return Model()


def samplers(network: nn.Module, noise: Tensor, steps: int) -> dict[str, Callable[[], Any]]:
    from accelerate import Accelerator

    accelerator, model = Accelerator(), _wrapped(network, tuple(noise.shape[1:])).to(noise.device)
    sigmas = _library.ScheduleDDPM().sample_sigmas(steps).to(noise.device)

    def sample() -> Tensor:
        *_, last = _library.samples(model, sigmas, batchsize=len(noise), xt=noise * sigmas[0], accelerator=accelerator)
        return last

    return {"smalldiffusion": sample}


def trainers(network: nn.Module, images: Tensor) -> dict[str, Callable[[], Any]]:
    """Its training loop, which is a generator: AdamW, no clipping, no average."""
    from accelerate import Accelerator

    # it hands out the loss before it goes backward: no other case may change the weights in between
    model = _wrapped(copy.deepcopy(network), tuple(images.shape[1:])).to(images.device)

    class Same:
        def __iter__(self) -> Any:
            return itertools.repeat(images)

    loop = _library.training_loop(Same(), model, _library.ScheduleDDPM(), accelerator=Accelerator(), lr=1e-4)
    return {"smalldiffusion": lambda: next(loop)}
