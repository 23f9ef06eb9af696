"""What a training changes: the weights, their average, the optimizer's memory and the number of the step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dualout.checkpoint import load_strictly
from dualout.denoiser import Denoiser
from dualout.errors import InputError
from dualout.training.config import TrainConfig
from dualout.training.ema import Ema

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
        self.average = Ema(denoiser, config.ema)
        self.parameters = {k: p for k, p in denoiser.named_parameters() if p.requires_grad}
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
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)

    @property
    def ema(self) -> Denoiser:
        """The denoiser with the averaged weights: the one to use."""
        return self.average.module

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradient."""
        self.scaler.scale(loss).backward()

    def update(self) -> tuple[float, Tensor]:
        """Change the weights by the gradient; returns the learning rate and the gradient's norm before clipping."""
        step, weights = self.step + 1, list(self.parameters.values())
        lr = self.config.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None], foreach=True)
        # on a processor it costs nothing to look whether there is anything to clip
        if self.config.grad_clip and not (norm.device.type == "cpu" and norm <= self.config.grad_clip):
            nn.utils.clip_grads_with_norm_(weights, self.config.grad_clip, norm, foreach=True)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(step)
        self.step = step
        return lr, norm

    def finite(self) -> bool:
        """Whether every weight, trained and averaged, is a finite number."""
        weights = [*self.denoiser.state_dict().values(), *self.ema.state_dict().values()]
        norms = torch._foreach_norm([w.detach() for w in weights if w.is_floating_point()])  # type: ignore[attr-defined]
        return bool(torch.stack(norms).isfinite().all())

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors, by file name and then by their own."""
        memory = {f"{name}/{key}": v for name, p in self.parameters.items() for key, v in self._moments(p).items()}
        return {"weights": self.denoiser.state_dict(), "average": self.ema.state_dict(), "optimizer": memory}

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
        """Go on from `tensors` and `numbers`.

        Raises:
            InputError: when they are not of this architecture; nothing was changed then.
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
            some = ", ".join(wrong[:4]) + (" …" if len(wrong) > 4 else "")
            raise InputError(f"{source}/optimizer is not of this network ({some}); nothing was loaded")
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
