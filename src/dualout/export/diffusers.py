"""A denoiser as a pipeline of diffusers, and back."""

from __future__ import annotations

import inspect
import tempfile
import warnings
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

from dualout import checkpoint, hub
from dualout.calibrated import Calibrated, Calibration
from dualout.card import LATENTS, public, render
from dualout.denoiser import Denoiser
from dualout.errors import InputError, unknown
from dualout.export.directory import whole
from dualout.export.runs import restored, shortened
from dualout.export.schedulers import build, prediction_type_of, schedule_of, scheduler_for
from dualout.export.steps import check_scheduler, first_noise, look, set_times, stepped, times_of
from dualout.files import read_json
from dualout.guidance import ClassifierFree
from dualout.parameterizations import Parameterization
from dualout.parameterizations.base import Route
from dualout.registry import built
from dualout.samplers import DDIM, Sampler
from dualout.samplers.diffusers import model_output, reads_variance
from dualout.schedules import Schedule
from dualout.version import __version__

INDEX = checkpoint.INDEX
_IGNORED = (
    "this network learned a variance, which {} does not use; DDPMScheduler with variance_type='learned_range' does"
)
OUTPUTS = ("pil", "np", "pt", "latent")
_MODULE = '''"""Lets diffusers find the pipeline, which HERE is the directory of:

DiffusionPipeline.from_pretrained(HERE, custom_pipeline=HERE, trust_remote_code=True)
"""

from dualout.export import DualOutputPipeline

__all__ = ["DualOutputPipeline"]
'''


class DualOutputPipeline(DiffusionPipeline):
    """Samples from a network read by any parameterization, with any scheduler of diffusers that takes noise, clean
    images or velocities.

    The network is an ordinary model of diffusers with as many output channels as its parameterization needs; how it is
    read is an entry of model_index.json.

    Args:
        unet: the network.
        scheduler: whose noise schedule must be the network's.
        parameterization: what the network's output means, as an object, its spec or its config.
        schedule: the noise levels the network was trained with; None is the scheduler's.
        clip: the range of x0, for schedulers that do not clip by themselves; None for latents.
        head: what a parameterization has learned besides the network, by name.
        calibration: numbers that correct the steps of one sampler (`Calibration.record`), for calls with
            ``calibrated=True``.
        card: what the model card says.
        spacing: of the sampler that the pipeline was made for, whose time steps are then visited while the scheduler
            is of its kind and has this timestep_spacing; None is the scheduler's own.

    Raises:
        InputError: when the scheduler has another noise schedule, or needs another prediction.
    """

    unet: Any
    scheduler: Any
    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ("latents", "x0", "eps", "ratio")

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: Any,
        parameterization: Parameterization | str | dict[str, Any] = "dual",
        schedule: Schedule | str | dict[str, Any] | None = None,
        clip: Sequence[float] | None = (-1.0, 1.0),
        head: dict[str, Any] | None = None,
        calibration: dict[str, Any] | None = None,
        card: dict[str, Any] | None = None,
        spacing: str | None = None,
    ) -> None:
        super().__init__()
        self.parameterization = built(Parameterization, parameterization)
        self.schedule = schedule_of(scheduler) if schedule is None else built(Schedule, schedule)
        check_scheduler(scheduler, self.schedule)
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(
            parameterization=self.parameterization.config(),
            schedule=self.schedule.config(),
            clip=None if clip is None else [float(c) for c in clip],
            head=head,
            # a pipeline is for others, who need not know where anything lies on this machine
            calibration=public(calibration),
            card=public(card or {}),
            spacing=spacing,
        )
        self.calibration  # noqa: B018  read once, so that what is damaged is told at once

    @classmethod
    def from_denoiser(
        cls,
        denoiser: Denoiser,
        scheduler: Any = None,
        *,
        clip: tuple[float, float] | None = (-1.0, 1.0),
        calibration: Calibration | None = None,
    ) -> DualOutputPipeline:
        """Make a pipeline of a denoiser; the weights are shared, not copied.

        Args:
            denoiser: around a model of diffusers.
            scheduler: a scheduler; the name of its class; or a sampler, whose counterpart is taken. None is DDIM with
                trailing steps, or the sampler that the calibration was made for.
            clip: the range of x0 where the scheduler or the sampler does not say.
            calibration: stored with the pipeline, for calls with ``calibrated=True``.

        Raises:
            InputError: when the network is not a model of diffusers.
        """
        if scheduler is None:
            scheduler = DDIM(clip=clip) if calibration is None else Sampler.from_config(calibration.sampler)
        spacing = None
        if isinstance(scheduler, Sampler):
            clip, spacing = scheduler.clip, scheduler.spacing if isinstance(scheduler.spacing, str) else None
            scheduler = scheduler_for(scheduler, denoiser.schedule, denoiser.parameterization)
        elif isinstance(scheduler, str):
            kind = prediction_type_of(denoiser.parameterization)
            scheduler = build(scheduler, denoiser.schedule, prediction_type=kind)
        head = None
        if denoiser.head is not None:
            head = {name: shortened(value) for name, value in denoiser.head.state_dict().items()}
        record = None if calibration is None else calibration.record()
        return cls(
            _model(denoiser.network), scheduler, denoiser.parameterization, denoiser.schedule, clip, head, record,
            denoiser.card, spacing,
        )  # fmt: skip

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser around this pipeline's network; the weights are shared, not copied."""
        denoiser = Denoiser(self.unet, self.parameterization, self.schedule)
        if denoiser.head is not None:
            if self.config["head"] is None:
                raise InputError(
                    f"the parameterization {self.parameterization.spec} has learned a head, which is missing"
                )
            most = max(value.numel() for value in denoiser.head.state_dict().values())
            tensors = {name: restored(value, most) for name, value in self.config["head"].items()}
            checkpoint.load_strictly(denoiser.head, tensors, "the pipeline's head")
        denoiser.card = dict(self.config["card"])
        return denoiser.train(self.unet.training)

    @property
    def calibration(self) -> Calibration | None:
        """The stored calibration."""
        record = self.config["calibration"]
        try:
            return None if record is None else Calibration(**record)
        except (TypeError, AttributeError) as error:
            raise InputError(f"the pipeline's calibration is damaged: {error}") from error

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
        latents: Tensor | None = None,
        class_labels: Tensor | Sequence[int] | int | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: Sequence[float] | None = None,
        conditions: dict[str, Any] | None = None,
        route: Route = "mix",
        calibrated: bool = False,
        height: int | None = None,
        width: int | None = None,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Make images.

        Args:
            batch_size: how many.
            generator: of the first noise and the scheduler's; a list has one an image, so that no image depends on the
                batch it is in.
            num_inference_steps: K; by default 50, or the calibration's.
            eta: DDIM's, from 0 (deterministic) to 1; for schedulers that take it.
            output_type: "pil"; "np" (B, H, W, C) or "pt" (B, C, H, W), both from 0 to 1; or "latent", as they are.
            return_dict: an `ImagePipelineOutput` instead of a tuple.
            latents: the first noise itself, standard normal, (B, C, H, W); signals and videos are made from it only.
            class_labels: one an image, or one for all, for networks that are told.
            guidance_scale: of classifier-free guidance away from "no class", the last of the network's; 1 is none.
            guidance_interval: the noise levels, sigma / alpha from above the first number to the second, that are
                guided; None is all.
            conditions: further arguments of the network, by name.
            route: which output to use: "mix", "eps", "x0", "velocity", "flow" or a fixed ratio.
            calibrated: correct the steps by the stored calibration.
            height, width: in pixels, where the network does not say.
            callback_on_step_end: called as (pipeline, step, time step, {name: tensor}) after each step; what it
                returns may hold other "latents" to go on with.
            callback_on_step_end_tensor_inputs: what it is given, of "latents", "x0", "eps" and "ratio".

        Raises:
            InputError: for what cannot be used, before any image is made.
        """
        if output_type not in OUTPUTS:
            raise unknown("output_type", output_type, OUTPUTS)
        if output_type != "latent" and LATENTS in self.config["card"]:
            raise InputError(
                f"this model makes latents, and its pipeline has no autoencoder: output_type {output_type!r} shows "
                'them as they are; say output_type="latent", and decode what it gives'
            )
        for name in callback_on_step_end_tensor_inputs:
            if name not in self._callback_tensor_inputs:
                raise unknown("tensor for callback_on_step_end:", name, self._callback_tensor_inputs)
        device = self._execution_device
        self._set_steps(num_inference_steps, calibrated, device)
        noise = first_noise(self.unet, batch_size, generator, latents, (height, width), device)
        if noise.ndim != 4 and output_type in ("pil", "np"):
            raise InputError(f'output_type {output_type!r} is for images; signals and videos are "pt" or "latent"')
        conditions = {**(conditions or {}), **self._labels(class_labels, len(noise), device)}
        denoiser = self._denoiser(route, calibrated, guidance_scale, guidance_interval, conditions)
        extra = self._arguments(eta, generator)
        clip = self.config["clip"]

        x = noise * self.scheduler.init_noise_sigma
        times = self.scheduler.timesteps.tolist()
        counted: Any = self.progress_bar
        for k, t in enumerate(counted(self.scheduler.timesteps)):
            x_t = self.scheduler.scale_model_input(x, t)
            p = look(denoiser, self.scheduler, k, times[k], x_t, **conditions)
            if k == 0 and "variance" in p.parts and not reads_variance(self.scheduler):
                warnings.warn(_IGNORED.format(type(self.scheduler).__name__), stacklevel=2)
            if calibrated:  # the images were corrected, too
                x = p.x_t if self.scheduler.init_noise_sigma == 1 else p.x_t / p.level.alpha
            x = stepped(self.scheduler, model_output(p, self.scheduler, clip), k, times, x, **extra)
            if callback_on_step_end is not None:
                found = {"latents": x, "x0": p.x0, "eps": p.eps, "ratio": p.parts.get("ratio")}
                given = {name: found[name] for name in callback_on_step_end_tensor_inputs}
                x = (callback_on_step_end(self, k, t, given) or {}).get("latents", x)
        self.maybe_free_model_hooks()
        images = self._out(x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _set_steps(self, steps: int | None, calibrated: bool, device: torch.device) -> None:
        check_scheduler(self.scheduler, self.schedule)
        calibration = self.calibration if calibrated else None
        if calibrated and calibration is None:
            raise InputError("calibrated=True needs a pipeline with a calibration (from_denoiser(…, calibration=…))")
        if calibration is None:
            steps = 50 if steps is None else steps
            times = times_of(self.scheduler, self.schedule, steps, self.config["spacing"])
            return set_times(self.scheduler, steps, times, device)
        if steps not in (None, len(calibration.times)):
            raise InputError(f"the calibration is for {len(calibration.times)} steps, got num_inference_steps={steps}")
        return set_times(self.scheduler, len(calibration.times), calibration.times, device)

    def _labels(self, labels: Any, count: int, device: torch.device) -> dict[str, Any]:
        if labels is None:
            return {}
        try:
            labels = torch.as_tensor(labels, device=device)
        except (TypeError, ValueError) as error:
            raise InputError(f"class_labels are numbers of classes, from 0; got {labels!r}") from error
        known = self.unet.config.get("num_class_embeds")
        if known and labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < known:
            raise InputError(f"class_labels are from 0 to {known - 1}; got {labels.tolist()}")
        if labels.ndim and len(labels) != count:
            raise InputError(f"{len(labels)} class_labels for {count} images: give one an image, or one for all")
        return {"class_labels": labels.expand(count)}

    def _denoiser(
        self, route: Route, calibrated: bool, scale: float, interval: Sequence[float] | None, conditions: dict[str, Any]
    ) -> Any:
        denoiser: Any = self.denoiser
        if route != "mix":
            if calibrated:
                raise InputError(f"calibrations are fitted to the trained blend, route 'mix'; got route {route!r}")
            denoiser = denoiser.route(route)
        if calibrated and self.calibration:
            denoiser = Calibrated.of(denoiser, self.calibration)
        if interval is not None and scale == 1:
            raise InputError("guidance_interval says where to guide, and guidance_scale how much: give that too")
        if scale != 1:
            classes = self.unet.config.get("num_class_embeds")
            if not classes or "class_labels" not in conditions:
                raise InputError("guidance_scale needs a network that is told classes, and class_labels")
            denoiser = ClassifierFree(denoiser, scale, interval=interval, class_labels=classes - 1)
        return denoiser

    def _arguments(self, eta: float, generator: Any) -> dict[str, Any]:
        """What else this scheduler's `step` takes."""
        known = inspect.signature(self.scheduler.step).parameters
        if eta and "eta" not in known:
            raise InputError(f"{type(self.scheduler).__name__} takes no eta; DDIMScheduler does")
        if not 0 <= eta <= 1:
            raise InputError(f"eta is from 0 (deterministic) to 1 (as noisy as DDPM); got {eta}")
        return {k: v for k, v in {"eta": eta, "generator": generator}.items() if k in known}

    def _out(self, x: Tensor, kind: str) -> Any:
        if kind == "latent":
            return x
        x = (x / 2 + 0.5).clamp(0, 1)
        if kind == "pt":
            return x
        array = x.cpu().permute(0, 2, 3, 1).numpy()
        return array if kind == "np" else self.numpy_to_pil(array)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **options: Any) -> DualOutputPipeline:
        """Read a pipeline directory, or one of the Hugging Face Hub; options are those of diffusers.

        Weights are safetensors, unless ``use_safetensors`` says otherwise. Code that lies in a directory is not run,
        unless ``trust_remote_code`` says so.

        Raises:
            InputError: for a directory with parts that need such code.
        """
        index = Path(pretrained_model_name_or_path) / INDEX
        if index.is_file() and not options.get("trust_remote_code"):
            _check_parts(index)
        return super().from_pretrained(str(pretrained_model_name_or_path), **{"use_safetensors": True, **options})

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:  # type: ignore[override]
        """Write the pipeline in diffusers' layout, and a model card, whole or not at all; options are diffusers' own.

        Raises:
            InputError: when it cannot be written, or has weights that are NaN or infinite.
        """
        if options.pop("push_to_hub", False):
            raise InputError("save_pretrained writes to disk; pipeline.push_to_hub(…) uploads")
        self._write(save_directory, dict(self.config["card"]), options)

    def _write(self, directory: str | Path, card: dict[str, Any], options: dict[str, Any]) -> None:
        checkpoint.check_values(checkpoint.tensors_of(self.unet))
        with whole(directory, last=INDEX) as aside:
            super().save_pretrained(str(aside), **options)
            (aside / "pipeline.py").write_text(_MODULE, encoding="utf-8", newline="\n")
            (aside / "README.md").write_text(self._card(card), encoding="utf-8", newline="\n")

    def _card(self, card: dict[str, Any]) -> str:
        calibration, more = self.calibration, {"scheduler": type(self.scheduler).__name__}
        if calibration is not None:
            more["calibrated for"] = Sampler.from_config(calibration.sampler).spec
        config = {
            "schedule": self.config["schedule"],
            "parameterization": self.config["parameterization"],
            "network": {"class": f"diffusers.{type(self.unet).__name__}", "arguments": dict(self.unet.config)},
            "image": {"channels": self.unet.config.in_channels, "size": self.unet.config.sample_size or 32},
            "dualout": __version__,
            "card": card,
            "more": more,
        }
        return render(config, "diffusers")

    def push_to_hub(self, repo_id: str, **options: Any) -> str:  # type: ignore[override]
        """Put the pipeline into a repository of the Hugging Face Hub; see `Denoiser.push_to_hub`."""
        hub.check(repo_id)
        with tempfile.TemporaryDirectory() as directory:
            self._write(directory, {**self.config["card"], "path": repo_id}, {})
            return hub.upload(directory, repo_id, **{"commit_message": "Upload a dualout pipeline", **options})


def _check_parts(index: Path) -> None:
    """Refuse parts of libraries that are not known: older versions of diffusers run code that lies beside them."""
    for name, part in read_json(index).items():
        if not isinstance(part, list) or not part or not isinstance(part[0], str):
            continue
        if part[0] not in ("diffusers", "transformers") or (index.parent / name / f"{part[0]}.py").exists():
            raise InputError(
                f"{index} names {name} {part}, which is of neither diffusers nor transformers and may bring code to be "
                "run; where you trust it, say trust_remote_code=True"
            )


def _model(network: Any) -> ModelMixin:
    """The model of diffusers that a denoiser's network is."""
    network = getattr(network, "_orig_mod", network)
    if not isinstance(network, ModelMixin) or not type(network).__module__.startswith("diffusers."):
        raise InputError(
            f"a pipeline of diffusers is made of its own models (UNet2DModel …), and this network is a "
            f"{type(network).__module__}.{type(network).__qualname__}; ONNX takes any network: --format onnx"
        )
    checkpoint.describe(network)
    return network
