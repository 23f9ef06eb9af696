"""The authors' code (yanivbenny/dual_diffusion), from a checkout that is named on the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dualout.schedules import Linear

NAME = "the authors' code"
_library: Any = None


def load(checkout: Path | None) -> None:
    global _library
    if checkout is None:
        raise ImportError("--authors PATH names a checkout of it")
    sys.path.insert(0, str(checkout))
    try:
        import src.diffusion
        import src.respace
    except ImportError as error:
        raise ImportError(f"{error}, in {checkout.name}") from error
    finally:
        sys.path.remove(str(checkout))
    _library = src


def version() -> str:
    return "as checked out"


def _diffusion(kind: str, implicit: bool) -> Any:
    betas = Linear().variances()
    return _library.diffusion.GaussianDiffusion(
        betas, model_mean_type=kind, model_var_type="fixedlarge", is_implicit=implicit
    )


def samplers(network: nn.Module, noise: Tensor, steps: int) -> dict[str, Callable[[], Any]]:
    """DDIM; with dual output where the network has 2C + 1 channels."""
    dual = network(noise, torch.zeros(len(noise), dtype=torch.long, device=noise.device)).shape[1] != noise.shape[1]
    times = _library.respace.respace_timesteps(1000, steps, "ddim")
    spaced = _library.respace.SpacedDiffusion(_diffusion("dualx" if dual else "eps", True), times)
    return {
        f"the authors' {'dual' if dual else 'eps'}": lambda: spaced.p_sample_loop(network, noise.shape, noise.device)
    }


def trainers(network: nn.Module, images: Tensor) -> dict[str, Callable[[], Any]]:
    """Their loss and average, without pytorch-lightning around them."""
    import copy

    averaged = copy.deepcopy(network).requires_grad_(False)
    diffusion = _diffusion("eps", False)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-4)

    def step() -> None:
        t = torch.randint(0, 1000, (len(images),), device=images.device)
        loss = diffusion.training_losses(network, images, t)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        new = dict(network.named_parameters())
        for name, old in averaged.named_parameters():
            old.data.mul_(0.9999).add_(new[name].data, alpha=1e-4)

    return {"the authors'": step}
