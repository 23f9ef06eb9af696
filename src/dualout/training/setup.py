"""From a configuration to what it names: images, network, device."""

from __future__ import annotations

import atexit
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from dualout import checkpoint, data, processes
from dualout.card import LATENTS, autoencoder_in, decoder_of
from dualout.data.base import Progress
from dualout.data.dataset import Dataset, check_dataset
from dualout.denoiser import Denoiser
from dualout.errors import InputError
from dualout.networks.adapter import config_of
from dualout.networks.build import build
from dualout.networks.device import device, layout
from dualout.networks.precision import Precision, choose
from dualout.networks.trace import call
from dualout.parameterizations import Parameterization
from dualout.randomness import noise
from dualout.schedules import Schedule
from dualout.training.changes import refuse_other_images
from dualout.training.config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.device_mesh import DeviceMesh


class Job(NamedTuple):
    """All that a training needs."""

    config: TrainConfig
    dataset: Dataset
    denoiser: Denoiser
    """With its first weights, on the device."""
    precision: Precision
    accelerator: Accelerator | None
    """Of several processes; None where this is the only one."""

    @property
    def device(self) -> torch.device:
        """Where the network is computed."""
        return self.precision.device

    def mesh(self) -> DeviceMesh:
        """The processes that share the weights; every one calls it."""
        from torch.distributed.device_mesh import init_device_mesh

        assert self.accelerator is not None
        return init_device_mesh(self.device.type, (self.accelerator.num_processes,))


def assemble(
    config: TrainConfig,
    *,
    denoiser: Denoiser | None = None,
    dataset: Dataset | None = None,
    known: dict[str, Any] | None = None,
    few: int | None = None,
    progress: Progress | None = None,
) -> Job:
    """Load the images, build the network and put it on its device.

    Args:
        config: what to build.
        denoiser: already built; None builds it.
        dataset: already loaded; None loads it.
        known: what the run is that goes on; None for a new one.
        few: how many images are decoded at most, to stand for the others; None for all.
        progress: told how far loading the images is.

    Raises:
        InputError: for anything that does not fit together.
    """
    accelerator = several_processes(config)
    if dataset is None:
        dataset = data.load(
            config.data, size=config.size, grey=config.grey, cache=config.cache, strict=config.strict, few=few,
            progress=progress,
        )  # fmt: skip
    check_dataset(dataset)
    if known is not None:
        path = Path(config.out or config.default_out()).expanduser()
        refuse_other_images(path, known, config.data, which_images(dataset))
    check_data(config, dataset)
    if denoiser is None:
        # the first weights are in a run's state, whatever they were made from
        denoiser = rebuild(known["denoiser"]) if known is not None else first_weights(config, dataset)
    check_fit(config, denoiser, dataset)
    place = accelerator.device if accelerator else device(config.device)
    alone = place.type == "cuda" and accelerator is None
    if config.graph and not alone:
        here = f"is on {place}" if accelerator is None else f"has {accelerator.num_processes} processes"
        raise InputError(f"--graph is for one process on an Nvidia GPU, and this training {here}: leave it out")
    last = layout(place) is torch.channels_last if config.channels_last is None else config.channels_last
    # weights that were saved in half precision are trained in float32
    denoiser.to(place, torch.float32)
    # FSDP divides contiguous weights only; convolutions follow the layout of the images
    weights = torch.channels_last if last and not config.fsdp else torch.contiguous_format
    denoiser.network.to(memory_format=weights)  # type: ignore[union-attr]
    try_out(config, denoiser, dataset)
    precision = choose(config.precision, place)
    if config.fsdp and precision.name == "fp16":
        raise InputError("--fsdp does not go with fp16, which is what --precision auto takes here; take fp32")
    graph = alone if config.graph is None else config.graph
    # what --init names goes with its latents
    decode = config.decode or (decoder_of({"card": denoiser.card}) if dataset.latents else None)
    config = replace(config, channels_last=last, graph=graph, decode=decode)
    return Job(config, dataset, denoiser, precision, accelerator)


def several_processes(config: TrainConfig) -> Accelerator | None:
    """The group that this process belongs to, when torchrun or accelerate launch started several."""
    if processes.count() <= 1:
        if config.fsdp:
            raise InputError(
                "--fsdp shares out the weights among several processes, and this is one: start more, as in "
                "torchrun --nproc-per-node 8 -m dualout train …, or leave it out"
            )
        return None
    if engine := processes.engine():
        raise InputError(
            f"accelerate is configured for {engine}, which would take hold of what training shares out itself: "
            "launch with accelerate launch --multi_gpu, or torchrun; --fsdp true divides the weights (FSDP2)"
        )
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    # precision and compiling are the run's own affair, and the same for all, whatever accelerate is configured to do
    cpu = config.device == "cpu" or not torch.accelerator.is_available()
    patience = InitProcessGroupKwargs(timeout=processes.PATIENCE if cpu else processes.PATIENCE_OF_GPUS)
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", dynamo_backend="no", kwargs_handlers=[patience])
    if config.batch_size % (config.accumulate * accelerator.num_processes):
        raise InputError(
            f"--batch_size {config.batch_size} cannot be shared equally by {accelerator.num_processes} processes with "
            f"--accumulate {config.accumulate}; it counts the images of all processes together"
        )
    # not after a run, as another may follow in the same group
    atexit.register(_leave_group)
    return accelerator


def _leave_group() -> None:
    """End the group of processes: its threads, left to the end of the interpreter, may abort the process there."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def first_weights(config: TrainConfig, dataset: Dataset) -> Denoiser:
    """A denoiser to start from: with random weights, which follow from the seed, or with those of --init."""
    if config.init is not None:
        return _initialized(config, dataset)
    parameterization = Parameterization.parse(config.parameterization or "dual")
    schedule = Schedule.parse(config.schedule or "linear")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return Denoiser(_network(config, dataset, parameterization), parameterization, schedule)


def _network(config: TrainConfig, dataset: Dataset, parameterization: Parameterization) -> nn.Module:
    return build(
        config.network or "tiny",
        dataset.channels,
        dataset.size,
        parameterization.channels(dataset.channels),
        classes=len(dataset.classes) if config.conditional else None,
    )


def _initialized(config: TrainConfig, dataset: Dataset) -> Denoiser:
    denoiser = Denoiser.from_pretrained(config.init)  # type: ignore[arg-type]
    own = {"parameterization": denoiser.parameterization.spec, "schedule": str(denoiser.schedule)}
    for name, value in own.items():
        asked = getattr(config, name)
        if asked is not None and asked != value:
            raise InputError(
                f"--init {config.init} was trained with {name} {value}, not with --{name} {asked}: leave that out; "
                "dualout upgrade gives a network a second output"
            )
    if config.network is not None:
        # a run's own settings, taken from its train.yaml, name its network
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            asked = _network(config, dataset, denoiser.parameterization)
        if checkpoint.describe(asked) != checkpoint.describe(denoiser.network):
            raise InputError(
                f"--init {config.init} brings its network, which is not --network {config.network}: leave that out"
            )
    return denoiser


def rebuild(described: dict[str, Any]) -> Denoiser:
    """The denoiser of a run that goes on; its weights come from the run's state."""
    return Denoiser(
        checkpoint.construct(described["network"]),
        Parameterization.from_config(described["parameterization"]),
        Schedule.from_config(described["schedule"]),
    )


def describe(denoiser: Denoiser) -> dict[str, Any]:
    """What `rebuild` reads."""
    return {
        "network": checkpoint.describe(denoiser.network),
        "parameterization": denoiser.parameterization.config(),
        "schedule": denoiser.schedule.config(),
    }


def described_now(described: dict[str, Any]) -> dict[str, Any]:
    """What `describe` would write today of what an earlier version described: options that came since are at their
    defaults."""
    return {
        "network": checkpoint.described_now(described["network"]),
        "parameterization": Parameterization.from_config(described["parameterization"]).config(),
        "schedule": Schedule.from_config(described["schedule"]).config(),
    }


def about_data(dataset: Dataset, *, conditional: bool) -> dict[str, Any]:
    """What a checkpoint's configuration says of the images that its model was trained on."""
    classes = {"classes": list(dataset.classes), "null": len(dataset.classes)}
    classes |= {"empty": empty} if (empty := dataset.empty_classes) else {}
    return {
        "image": {"channels": dataset.channels, "size": list(dataset.size), "latents": dataset.latents},
        "data": {"name": dataset.name, "fingerprint": dataset.fingerprint, "images": len(dataset)},
        "conditions": {"class_labels": classes} if conditional else {},
    }


def which_images(dataset: Dataset) -> dict[str, Any]:
    """What the images of a run are known again by, wherever they lie."""
    return {
        "images": len(dataset),
        "shape": list(dataset.shape),
        "classes": len(dataset.classes),
        "fingerprint": dataset.fingerprint,
    }


def data_on_card(dataset: Dataset) -> dict[str, Any]:
    """What a model card says of them."""
    return {"name": dataset.name, "fingerprint": dataset.fingerprint, "classes": ", ".join(dataset.classes)}


def check_data(config: TrainConfig, dataset: Dataset) -> None:
    """Refuse data that cannot be learnt from in this way."""
    if config.conditional and (dataset.labels is None or not dataset.classes):
        raise InputError(f"--conditional needs classes, and the data {dataset.name!r} have none")
    if autoencoder_in(config.decode) is not None and not dataset.latents:
        raise InputError(f"the data {dataset.name!r} are pictures, not latents: leave out --decode {config.decode}")
    if config.flip and dataset.latents:
        raise InputError(
            f"--flip mirrors images; {dataset.name!r} holds latents, whose mirror image is not the image's"
        )


_CONDITIONS = {
    "cross_attention_dim": "text",
    "joint_attention_dim": "text",
    "caption_channels": "text",
    "num_embeds_ada_norm": "classes by its norms",
}


def check_fit(config: TrainConfig, denoiser: Denoiser, dataset: Dataset) -> None:
    """Refuse a network that does not take these images."""
    if not isinstance(denoiser.network, nn.Module):
        raise InputError(f"only a torch.nn.Module can be trained; the network is {denoiser.network!r}")
    coder = denoiser.card.get(LATENTS)
    if coder is not None and not dataset.latents:
        raise InputError(
            f"the network takes latents of its pipeline's {coder}, and the data {dataset.name!r} are pictures: encode "
            "them with it, times its scaling_factor, into a file for --data arrays:FILE:latents=true"
        )
    arguments = config_of(denoiser.network)
    asks = next((k for k in _CONDITIONS if arguments.get(k)), None)
    if asks is not None:
        raise InputError(
            f"the network is told {_CONDITIONS[asks]} ({asks}), and commands tell none but the classes of a "
            "num_class_embeds. In Python any condition is passed on: dualout.widen(network, 2 * C + 1, "
            "example=(x_t, t, {name: condition})), and denoiser.loss(x0, t, noise, name=condition); "
            "dualout.training.closed_form.fit upgrades without a loop"
        )
    takes, gives = arguments.get("in_channels"), arguments.get("out_channels")
    needed = denoiser.parameterization.channels(dataset.channels)
    if takes not in (None, dataset.channels):
        raise InputError(
            f"the network takes images of {takes} channels, the data {dataset.name!r} have {dataset.channels}; "
            "--grey turns images grey or to colour"
        )
    if gives is not None and gives < needed:
        raise InputError(
            f"{denoiser.parameterization.spec} of {dataset.channels}-channel images needs {needed} output channels, "
            f"the network has {gives}; dualout upgrade widens it"
        )
    told = arguments.get("num_class_embeds")
    if config.conditional and told != len(dataset.classes) + 1:
        raise InputError(
            f"--conditional needs a network that is told {len(dataset.classes)} classes and one for none; "
            f"this one is told {told or 'none'}"
        )
    if not config.conditional and told:
        raise InputError(f"this network is told {told} classes: train it with --conditional")


def try_out(config: TrainConfig, denoiser: Denoiser, dataset: Dataset) -> None:
    """Refuse a network that fails at an image of this size: most halve it several times, which not every size bears."""
    network, times = denoiser.network, denoiser.times
    assert isinstance(network, nn.Module)
    # not t = 0: networks that are told a noise level may take its logarithm
    t = times[len(times) // 2].expand(1)
    told = {"class_labels": torch.zeros_like(t)} if config.conditional else {}
    call(network, (noise([0], dataset.shape, device=t.device), t, told))
