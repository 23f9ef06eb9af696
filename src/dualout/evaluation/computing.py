"""What computes the images of a sampling: eager torch, or a backend that is made ready when it is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dualout.denoiser import Denoiser
from dualout.evaluation.model import Model
from dualout.guidance import ClassifierFree
from dualout.networks import backends
from dualout.networks.precision import Precision
from dualout.randomness import Draw
from dualout.samplers import Sampler
from dualout.samplers.base import Denoises


class Computing:
    """All steps of a sampler, with the network as a backend computes it from `prepare` to `release`, and eager before.

    Args:
        model: whose networks, once prepared, all its samplings share.
        routed: its denoiser as it is read; while a backend is ready, its network is the prepared one.
        view: what the sampler asks: `routed`, or a calibration or guidance around it.
        sampler: how it goes from noise to images.
        backend: by name, or "auto".
        precision: of the network.
    """

    ready: bool
    """Whether there is nothing to prepare."""

    def __init__(
        self, model: Model, routed: Denoiser, view: Denoises, sampler: Sampler, backend: str, precision: Precision
    ) -> None:
        self.model, self.routed, self.view, self.sampler = model, routed, view, sampler
        self.backend, self.precision = backend, precision
        self._record: dict[str, Any] = {"backend": backend}
        self._steps = "eager"
        self.release()

    def sample(self, noise: Tensor, draw: Draw | None, conditions: Mapping[str, Any]) -> Tensor:
        """Images (B, C, H, W); arguments are those of `Sampler.sample`."""
        with self.precision.autocast():
            return self._sample(noise, draw, **conditions)

    def prepare(self, noise: Tensor, conditions: dict[str, Any], calls: int, own: int) -> None:
        """Get the backend ready.

        Args:
            noise: an example of what it will be called with, (B, C, H, W).
            conditions: that go with it.
            calls: how often the network will be called, by this sampling and others of the model.
            own: of these, by this sampling.

        Raises:
            InputError: when the backend cannot compute this network, or not near enough to eager.
        """
        network: nn.Module = self.routed.network  # type: ignore[assignment]
        examples = self._examples(network, noise, conditions)
        shapes = [tuple(v.shape) for v in examples[0].tensors]
        key = (self.backend, self.precision.name, *examples[0].conditions, *shapes)
        if key not in self.model.prepared:
            self.model.prepared[key] = backends.choose(self.backend, network, examples, self.precision, calls)
        chosen = self.model.prepared[key]
        self._record, self.routed.network, self.ready = chosen.record, chosen.network, True
        with self.precision.autocast():
            fused, self._steps = backends.fuse(self._record["backend"], self.view, self.sampler, noise, conditions, own)
        self._sample = fused or self._sample

    def release(self) -> None:
        """Let go of what `prepare` made; what computed the images stays known."""
        self._sample: Callable[..., Tensor] = partial(self.sampler.sample, self.view)
        self.routed.network, self.ready = self.model.denoiser.network, self.backend == "eager"

    @torch.no_grad()
    def _examples(self, network: nn.Module, noise: Tensor, conditions: dict[str, Any]) -> list[backends.Call]:
        """What the network is called with in the first, the middle and the last step, were they all of pure noise."""
        times = self.sampler.timesteps(self.model.denoiser.schedule)
        if isinstance(self.view, ClassifierFree):
            times = [t for t in times if self.view.doubles(t)]
        recorder = _Recorder(network)
        self.routed.network = recorder
        try:
            for t in (times[0], times[len(times) // 2], times[-1]):
                self.view(noise, t, **conditions)
        finally:
            self.routed.network = network
        return recorder.calls

    def record(self) -> dict[str, Any]:
        """The backends of the network and of the rest of a step, as plain JSON values."""
        return self._record | {"steps": self._steps}


class _Recorder(nn.Module):
    """A network that keeps what it is called with."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.calls: list[backends.Call] = []

    def forward(self, x_t: Tensor, t: Tensor, **conditions: Any) -> Any:
        """The network's own output."""
        self.calls.append(backends.Call(x_t, t.contiguous(), conditions))
        return self.network(x_t, t, **conditions)
