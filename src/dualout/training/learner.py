"""What a training changes: the weights, their average, the optimizer's memory and the number of the step."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dualout.checkpoint import load_strictly
from dualout.denoiser import Denoiser
from dualout.errors import InputError, some
from dualout.training.config import TrainConfig
from dualout.training.ema import Ema

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_ADAM = ("step", "exp_avg", "exp_avg_sq")


class Learner:
    """A denoiser, its average and its optimizer. All of it is in `tensors` and `numbers`, from which it goes on.

    Args:
        denoiser: is trained in place, where it is; weights that do not require gradients stay as they are.
        config: of the optimizer and the average.
        scaled: whether losses are scaled up, for fp16.

    Raises:
        InputError: when no weight requires a gradient.
    """

    def __init__(self, denoiser: Denoiser, config: TrainConfig, *, scaled: bool = False) -> None:
        self.denoiser, self.config = denoiser.train(), config
        self.step = 0
        """How many updates were made."""
        self.averaging = Ema(denoiser, config.ema, warmup=config.ema_warmup)
        """What keeps the average up; the average itself is `ema`."""
        self.sharded = False
        """Whether the weights are divided among processes."""
        self._whole: Denoiser | None = None
        self._optimize()
        device = next(iter(self.parameters.values())).device
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)

    def _optimize(self) -> None:
        config = self.config
        self.parameters = {k: p for k, p in self.denoiser.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise InputError("no weight of this network requires a gradient: there is nothing to train")
        device = next(iter(self.parameters.values())).device
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=device.type in ("cpu", "cuda", "mps"),
        )

    @property
    def ema(self) -> Denoiser:
        """The denoiser with the averaged weights: the one to use; where they are sharded, as of the last `gather`."""
        return self.averaging.module if self._whole is None else self._whole

    def shard(self, mesh: DeviceMesh, *, first: bool) -> None:
        """Divide weights, gradients, average and the optimizer's memory among processes, which all have the same.

        Args:
            mesh: the processes, in one dimension.
            first: whether this is the one that also holds the averaged weights whole, to write and to sample them.
        """
        from dualout.training import shards

        memory = {name: self._moments(p) for name, p in self.parameters.items()}
        self._whole = copy.deepcopy(self.ema) if first else None
        average = self.averaging.module
        for denoiser in (self.denoiser, average):
            shards.shard(denoiser, mesh)
        self.averaging = Ema(self.denoiser, self.config.ema, average, warmup=self.config.ema_warmup)
        self._optimize()
        for name, p in self.parameters.items():
            divided = {key: shards.like(p, memory[name][key].contiguous()) for key in _ADAM[1:]}
            self.optimizer.state[p] = {"step": memory[name]["step"].to(p.device), **divided}
        self.sharded = True

    def gather(self) -> None:
        """Bring the averaged weights together in the first process's `ema`; every process calls it."""
        if self.sharded:
            from dualout.training import shards

            average = shards.whole(self.averaging.module.state_dict(), self._whole is not None)
            if self._whole is not None:
                self._whole.load_state_dict(average)

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradient."""
        self.scaler.scale(loss).backward()

    def update(self) -> tuple[float, Tensor]:
        """Change the weights by the gradient; returns the learning rate and the gradient's norm before clipping.

        Where a scaled gradient overflows (fp16), the weights stay and the norm is 0.
        """
        step, weights = self.step + 1, list(self.parameters.values())
        lr = self.config.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        # torch refuses it on Apple's GPUs
        foreach = weights[0].device.type != "mps"
        norm = total = nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None], foreach=foreach)
        if self.sharded:
            from dualout.training import shards

            total = shards.one(norm)
        # on a processor it costs nothing to look whether there is anything to clip
        if self.config.grad_clip and not (total.device.type == "cpu" and total <= self.config.grad_clip):
            nn.utils.clip_grads_with_norm_(weights, self.config.grad_clip, norm, foreach=foreach)
        if self.scaler.is_enabled():
            # what overflowed only by its scale is no fault: the scaler leaves this step out and halves the scale
            scale = self.scaler.scale(torch.ones_like(total))
            total = torch.where(total.isfinite() | (scale <= 1), total, torch.zeros_like(total))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.averaging.update(step)
        self.step = step
        return lr, total

    def finite(self) -> bool:
        """Whether every weight, trained and averaged, is a finite number."""
        weights = [*self.denoiser.state_dict().values(), *self.averaging.module.state_dict().values()]
        weights = [w.detach() for w in weights if w.is_floating_point()]
        if not self.sharded:
            return bool(_finite(weights))
        from dualout.training import shards

        return shards.all_say(_finite(shards.parts(weights)))

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors, by file name and then by their own.

        Where they are sharded, every process calls it, and the first gets them, whole and on the host.
        """
        memory = {f"{name}/{key}": v for name, p in self.parameters.items() for key, v in self._moments(p).items()}
        average = self.averaging.module.state_dict()
        found = {"weights": self.denoiser.state_dict(), "average": average, "optimizer": memory}
        if not self.sharded:
            return found
        from dualout.training import shards

        return {name: shards.whole(tensors, self._whole is not None) for name, tensors in found.items()}

    def _moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.optimizer.state.get(parameter)
        if not state:
            # no gradient has come yet: what the optimizer would begin with
            return {"step": torch.zeros(())} | {key: torch.zeros_like(parameter) for key in _ADAM[1:]}
        return {key: state[key] for key in _ADAM}

    def numbers(self) -> dict[str, Any]:
        """What else goes into a checkpoint, as JSON values."""
        return {"step": self.step, "scaler": self.scaler.state_dict()}

    def load(self, tensors: dict[str, dict[str, Tensor]], numbers: dict[str, Any], source: str) -> None:
        """Go on from `tensors` and `numbers`, before anything is sharded.

        Raises:
            InputError: when they are not of this architecture, or hold what is not finite.
        """
        memory = self._memory(tensors["optimizer"], source)
        load_strictly(self.ema, tensors["average"], f"{source}/average")
        load_strictly(self.denoiser, tensors["weights"], f"{source}/weights")
        self.optimizer.state.update(memory)
        if self.scaler.is_enabled() and numbers["scaler"]:
            self.scaler.load_state_dict(numbers["scaler"])
        self.step = int(numbers["step"])

    def _memory(self, tensors: dict[str, Tensor], source: str) -> dict[Tensor, dict[str, Tensor]]:
        expected = {f"{name}/{key}" for name in self.parameters for key in _ADAM}
        wrong = [
            name
            for name in sorted(expected | tensors.keys())
            if name not in tensors or name not in expected or not self._fits(name, tensors[name])
        ]
        if wrong:
            raise InputError(f"{source}/optimizer is not of this network ({some(wrong, 4)}); nothing was loaded")
        return {
            p: {
                "step": tensors[f"{name}/step"].clone().to(p.device),
                # laid out as the weight: the fused optimizer goes through both side by side
                **{key: torch.empty_like(p).copy_(tensors[f"{name}/{key}"]).detach() for key in _ADAM[1:]},
            }
            for name, p in self.parameters.items()
        }

    def _fits(self, name: str, tensor: Tensor) -> bool:
        parameter, _, key = name.rpartition("/")
        shape = torch.Size() if key == "step" else self.parameters[parameter].shape
        return tensor.shape == shape and bool(tensor.isfinite().all())


def _finite(weights: list[Tensor]) -> Tensor:
    norms = torch._foreach_norm(weights)  # type: ignore[attr-defined]
    return torch.stack(norms).isfinite().all()
