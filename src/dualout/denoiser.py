"""A network, the way to read it, and the noise schedule: from (x_t, t) to a Prediction."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from dualout import bounded, checkpoint, hub
from dualout.card import public
from dualout.errors import InputError
from dualout.levels import HALF, Level, lasting
from dualout.parameterizations.base import Parameterization, Route, check_channels, check_losses
from dualout.prediction import Prediction
from dualout.schedules import Schedule

Network = nn.Module | Callable[..., Any]


class Loss(NamedTuple):
    """What training minimizes."""

    total: Tensor
    """The weighted sum of the parts' means: a scalar."""
    parts: dict[str, Tensor]
    """Every part by name, one number an image, (B,)."""

    def __repr__(self) -> str:
        """Numbers to look at while training: the total, and the mean of each part."""
        means = [f"{name} {float(part.detach().mean()):.4g}" for name, part in self.parts.items()]
        return f"Loss({float(self.total.detach()):.4g}: {', '.join(means)})"


class Denoiser(nn.Module):
    """Maps noisy images to a prediction of the clean ones.

    Args:
        network: a module or callable ``(x_t, t, **conditions)`` that returns a tensor, a tuple that begins with one, or
            an object with one in `.sample`; t is a LongTensor (B,). `dualout.networks` adapts other conventions.
        parameterization: what the network's output means.
        schedule: the noise levels that t counts.
    """

    times: Tensor

    if TYPE_CHECKING:  # torch's is of Any
        __call__: Callable[..., Prediction]

    def __init__(self, network: Network, parameterization: Parameterization, schedule: Schedule) -> None:
        super().__init__()
        if not isinstance(parameterization, Parameterization):
            raise InputError(f"parameterization is, say, dualout.Dual(); got {parameterization!r}")
        if not isinstance(schedule, Schedule):
            raise InputError(f"schedule is, say, dualout.schedules.Linear(); got {schedule!r}")
        if not callable(network):
            raise InputError(f"a network is a module or function (x_t, t, **conditions); got {network!r}")
        _check_schedules(network, schedule)
        self.network = network
        self.parameterization = parameterization
        self.schedule = schedule
        self.head = parameterization.head(schedule)
        self.card: dict[str, Any] = {}
        """What is written on the model card: how it was trained, and its metrics with their protocols."""
        # the denoiser's own tensors are on the network's device
        device = next((p.device for p in network.parameters()), None) if isinstance(network, nn.Module) else None
        self.register_buffer("times", torch.arange(schedule.steps, device=device), persistent=False)
        if self.head is not None:
            self.head.to(device)
        # its tables are checked, and made before anything is traced, which making them is not for
        schedule.scalars(0)
        schedule.level(self.times[:1])
        self._rows: tuple[Any, dict[int, Tensor]] = None, {}
        self._note_weight()

    def forward(self, x_t: Tensor, t: int | Tensor, **conditions: Any) -> Prediction:
        """Predict the clean images, and the noise, from noisy images.

        Args:
            x_t: noisy images, (B, C, H, W); half precision is read in float32.
            t: their time step, 0 … T−1: one int for all, or a LongTensor (B,).
            conditions: passed on to the network.

        Raises:
            InputError: for images that are not floats, a `t` that is none of the schedule's or of another number, or
                an output of another shape than the parameterization reads.
        """
        if getattr(x_t, "dtype", None) is not torch.float32:
            x_t = _in_full_precision(x_t)
        if not isinstance(t, Tensor):
            level, time = self.schedule.scalars(t), self._time(int(t), x_t)
        else:
            _check_times(t, x_t)
            t = t if t.shape == x_t.shape[:1] else t.expand(len(x_t))
            level, time = self.schedule.level_for(x_t, t), t.long()
        prediction = self.parameterization.read(self.raw(x_t, time, level, **conditions), x_t, level)
        if not isinstance(prediction, Prediction):
            name, got = self.parameterization.name, type(prediction).__name__
            raise InputError(f"read() of parameterization {name!r} returns a Prediction; got {got}")
        return prediction

    def extra_repr(self) -> str:
        """What `repr` says besides the network."""
        return f"parameterization={self.parameterization.spec}, schedule={self.schedule.name} of {self.schedule.steps}"

    def raw(self, x_t: Tensor, time: Tensor, level: Level, **conditions: Any) -> Tensor:
        """The network's raw output, (B, channels, H, W).

        Args:
            x_t: noisy images, (B, C, H, W).
            time: their time step, as the network takes it, (B,).
            level: their noise level, floats or tensors shaped to broadcast.
            conditions: passed on to the network.
        """
        scale = self.parameterization.input_scale(level)
        x_in = x_t if scale is None else x_t * scale
        if self._weight and self._weight[0].dtype != x_t.dtype:
            x_in = x_in.to(self._weight[0].dtype)
        # quicker than the attribute, which a module looks for in several dictionaries
        network = self._modules.get("network")
        if network is None:  # a function
            network = self.network
        raw = tensor_of(network(x_in, time, **conditions))
        if raw.dtype != x_t.dtype:
            raw = raw.to(x_t.dtype)
        if self.head is not None:
            check_channels(raw, x_t, (self.parameterization.channels(x_t.shape[1]),), self.parameterization.name)
            raw = self.head(raw, time)
        return raw

    def loss(self, x0: Tensor, t: int | Tensor, noise: Tensor, **conditions: Any) -> Loss:
        """The training loss for clean images with given noise.

        Args:
            x0: clean images, (B, C, H, W); those in half precision are noised in float32, of which the noise that
                was added is a small part at low t.
            t: their time step, 0 … T−1: a LongTensor (B,), or one int for all.
            noise: standard normal, (B, C, H, W).
            conditions: passed on to the network.

        Raises:
            InputError: when the shapes do not agree, or as `forward` does.
        """
        if getattr(x0, "dtype", None) is not torch.float32:
            x0 = _in_full_precision(x0)
        if (given := getattr(noise, "shape", None)) != x0.shape:
            raise InputError(
                f"each image has noise of its own, say torch.randn_like(x0): got {given and tuple(given)} for "
                f"{tuple(x0.shape)}"
            )
        if isinstance(t, Tensor):
            _check_times(t, x0)
            alpha, sigma = self.schedule.level_for(x0, t)
        else:
            alpha, sigma = self.schedule.scalars(t)
        prediction = self(alpha * x0 + sigma * noise, t, **conditions)
        parts = self.parameterization.losses(prediction, x0, noise)
        check_losses(parts, len(x0), self.parameterization.name)
        weights = self.parameterization.weights(self.schedule)
        total = torch.stack([weights.get(name, 1.0) * part.mean() for name, part in parts.items()]).sum()
        return Loss(total, parts)

    def route(self, route: Route) -> Denoiser:
        """The same network with only one of its outputs used; the weights are shared, not copied.

        Args:
            route: "mix" (all, as trained), "eps", "x0", "velocity", "flow", or a fixed ratio from 0 to 1.
        """
        view = Denoiser(self.network, self.parameterization.route(route), self.schedule)
        view.head = self.head if view.head is not None else None
        view.card, view.times = self.card, self.times
        # and not view.train(…): the mode of what is shared is its owner's
        view.training = self.training
        return view

    def save_pretrained(self, path: str | Path, **extra: Any) -> None:
        """Write a checkpoint directory: config.json, model.safetensors and README.md, whole or not at all.

        Args:
            path: the directory, made if it is missing.
            extra: further JSON values for config.json, say image={"channels": C, "size": [H, W]} where the network
                does not say what images it makes, and "latents": True in it where they are latents, which commands
                neither clip nor show.

        Raises:
            InputError: when the network's class is not one that can be rebuilt from its configuration, weights are
                NaN or infinite, or the directory cannot be written.
        """
        self._write(path, self.card, extra)

    def _write(self, path: str | Path, card: dict[str, Any], extra: dict[str, Any]) -> None:
        image = checkpoint.image_of(self.network)
        config = {
            "schedule": self.schedule.config(),
            "parameterization": self.parameterization.config(),
            "network": checkpoint.describe(self.network),
        }
        if taken := config.keys() & extra.keys():
            raise InputError(f"config.json has the {min(taken)} of the denoiser itself, which nothing else can be")
        config |= {"image": image} if image else {}
        checkpoint.write(path, config | extra, checkpoint.tensors_of(self), card)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a dualout denoiser",
        **extra: Any,
    ) -> str:
        """Put the checkpoint into a repository of the Hugging Face Hub, which is made if it is missing.

        Of paths on this machine that its card holds, such as those of the images, the last name is uploaded.

        Args:
            repo_id: "name/repository".
            private: whether a new repository is seen by its owner only; None is the account's default.
            token: of an account that may write to it; None is that of ``hf auth login`` or HF_TOKEN.
            revision: a branch, made if it is missing; None is the main one.
            commit_message: what the repository's history says.
            extra: further JSON values for config.json.

        Returns:
            the commit's address.

        Raises:
            InputError: when the network cannot be saved, or the Hub does not take it; nothing is left behind.
        """
        hub.check(repo_id)
        with tempfile.TemporaryDirectory() as directory:
            self._write(directory, public(self.card) | {"path": repo_id}, extra)
            return hub.upload(
                directory, repo_id, private=private, token=token, revision=revision, commit_message=commit_message
            )

    @classmethod
    def from_pretrained(cls, path: str | Path, network: nn.Module | None = None) -> Denoiser:
        """Read a checkpoint directory, or one of the Hugging Face Hub ("name/repository").

        Nothing in it is run: the network's class comes from an allow-list, the weights from safetensors.

        Args:
            path: directory or Hub id.
            network: a network of the right architecture, where the checkpoint's own class is not on the list.

        Raises:
            InputError: for anything missing, damaged, of another architecture or not allowed.
        """
        directory = checkpoint.locate(path)
        config = checkpoint.read_config(directory)
        own_class = network is None
        if network is None:
            with bounded.no_larger_than(directory / checkpoint.WEIGHTS):
                network = checkpoint.construct(config["network"])
        parameterization = Parameterization.from_config(config["parameterization"])
        denoiser = cls(network, parameterization, Schedule.from_config(config["schedule"]))
        checkpoint.load_weights(directory, denoiser, as_saved=own_class)
        denoiser._note_weight()
        denoiser.card = checkpoint.read_card(config)
        return denoiser.eval()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Denoiser:
        super()._apply(fn, recurse)
        # to_empty leaves them without values, and no checkpoint has them
        with torch.inference_mode(False):
            self.times = torch.arange(self.schedule.steps, device=self.times.device)
        self._note_weight()
        return self

    def _note_weight(self) -> None:
        parameters = self.network.parameters() if isinstance(self.network, nn.Module) else iter(())
        # a weight itself, since network.half() is nothing that a denoiser hears of
        self._weight = tuple(islice((p for p in parameters if p.dtype.is_floating_point), 1))

    def _time(self, t: int, x_t: Tensor) -> Tensor:
        """`t` for each image, where the images are."""
        there, rows = self._rows
        if there != (here := (x_t.shape[0], x_t.device)):
            rows = {}
            self._rows = here, rows
        row = rows.get(t)
        if row is None:
            row = self.times[t].to(x_t.device).expand(x_t.shape[0])
            if lasting(row):
                rows[t] = row
        return row


def _in_full_precision(images: Tensor) -> Tensor:
    """Images in float32 where they were in half precision, else as they are; what is no tensor of floats is refused."""
    if not isinstance(images, Tensor):
        raise InputError(f"images are tensors (B, C, H, W), say torch.from_numpy(x); got {type(images).__name__}")
    if not images.dtype.is_floating_point:
        raise InputError(f"images are floats in [−1, 1], got {images.dtype}; x.float() / 127.5 - 1 is for 0 to 255")
    return images.float() if images.dtype in HALF else images


def _check_times(t: Tensor, images: Tensor) -> None:
    if t.ndim > 1 or t.numel() not in (1, len(images)):
        raise InputError(f"{len(images)} images have one time step, or one each; got t of shape {tuple(t.shape)}")


def _check_schedules(network: Any, schedule: Schedule) -> None:
    """Refuse a network whose adapters tell it the noise levels of another schedule."""
    while isinstance(network, nn.Module):
        other = getattr(network, "schedule", schedule)
        if isinstance(other, Schedule) and other != schedule:
            raise InputError(
                f"the network is told the noise levels of {other} by its {type(network).__name__}, and the denoiser "
                f"counts those of {schedule}: say the same for both"
            )
        network = getattr(network, "network", None)


def tensor_of(output: Any) -> Tensor:
    """What a network gives, out of the object or tuple it comes in.

    Raises:
        InputError: when it gives something else than a tensor.
    """
    if isinstance(output, Tensor):
        return output
    sample = next(iter(output), None) if isinstance(output, tuple) else getattr(output, "sample", None)
    if not isinstance(sample, Tensor):
        raise InputError(
            f"a network returns a tensor, a tuple that begins with one, or an object with .sample; got {type(output)}"
        )
    return sample
