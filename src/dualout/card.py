"""The model card of a checkpoint."""

from __future__ import annotations

import re
from typing import Any

LATENTS = "latents of"
"""The entry of a card that says what makes its model's images of pictures: a part of the pipeline that it is of."""
DECODER = "decoded by"
"""The entry of a card that names the autoencoder which makes pictures of its model's latents."""
AS_THEY_ARE = "none"
"""Said in place of an autoencoder: latents are not decoded."""
_PLACE = re.compile(r"(?<![^\s:=])(?:~[^\s:/\\]*|[A-Za-z]:|\\)?[/\\](?=[^\s/\\])[^:]*[/\\](?=[^/\\])")
"""What leads to the last name of an absolute path, alone or in a spec such as folder:/disk/ann/my pictures:size=64."""
_USES = {
    "dualout": """```python
import dualout

denoiser = dualout.Denoiser.from_pretrained("{path}")
noise = dualout.noise(range(16), {shape})
images = dualout.samplers.DDIM(steps=10{unclipped}).sample(denoiser, noise{conditions})
```""",
    "diffusers": """```python
from dualout.export import DualOutputPipeline

pipeline = DualOutputPipeline.from_pretrained("{path}")
images = pipeline(batch_size=16, num_inference_steps=10{conditions}).images
```

The network is an ordinary model of diffusers; only reading its output needs dualout.""",
    "onnx": """```python
import dualout
from dualout.export import OnnxDenoiser

denoiser = OnnxDenoiser("{path}")
noise = dualout.noise(range(16), {shape})
images = dualout.samplers.DDIM(steps=10{unclipped}).sample(denoiser, noise{conditions})
```

Or with any ONNX runtime: `model.onnx` takes noisy images `x_t` (B, C, H, W), their time steps `t` (B,), 0 … T−1{told}.
It gives the clean images `x0` and the noise `eps` that it predicts. Its metadata `dualout` hold the noise schedule.""",
}
_CLASSES = """

Images are told their classes, 0 to {last}; {none} stands for none, which guidance goes away from."""


def render(config: dict[str, Any], library: str = "dualout") -> str:
    """README.md for a checkpoint's configuration, with the front matter that the Hugging Face Hub reads.

    Args:
        config: schedule, parameterization, network, and what else there is.
        library: what the model is loaded with: dualout, diffusers or onnx.
    """
    config = public(config)
    card = config.get("card", {})
    parameterization, schedule, network = config["parameterization"], config["schedule"], config["network"]
    channels, size = image_said(config.get("image", {}), network)
    shape = (channels or 3, *(size if isinstance(size, list | tuple) else (size or 32,) * 2))
    latents = makes_latents(config)
    sections = [
        f"---\nlibrary_name: {library}\npipeline_tag: unconditional-image-generation\n"
        "tags: [diffusion, dual-output, dualout]\n---",
        f"# {_cell(card.get('title', heading(parameterization['name'])))}",
        f"Made with dualout {config.get('dualout', '')}.",
        _table(
            "Model",
            {
                "parameterization": _short(parameterization),
                "schedule": _short(schedule),
                "network": network["class"],
                "images": " × ".join(map(str, shape)) + (", latents" if latents else " in [−1, 1]"),
                **({DECODER: decoder} if (decoder := decoder_of(config)) else {}),
                **config.get("more", {}),
            },
        ),
        _use(library, card.get("path", "PATH"), shape, class_count(network), latents),
    ]
    sections += [
        _table(title, card[key]) for key, title in (("training", "Training"), ("data", "Data")) if card.get(key)
    ]
    sections += [_metrics(card["metrics"])] if card.get("metrics") else []
    return "\n\n".join(sections) + "\n"


def _use(library: str, path: str, shape: tuple[int, ...], classes: int | None, latents: bool) -> str:
    given = {"path": path, "shape": shape, "unclipped": ", clip=None" if latents else ""}
    given["told"] = "" if classes is None else ", and `class_labels` (B,)"
    output = ', output_type="latent"' if latents and library == "diffusers" else ""
    if classes is None:
        return "## Use\n\n" + _USES[library].format(**given, conditions=output)
    labels = f"[i % {classes} for i in range(16)]"
    conditions = f", class_labels={labels if library == 'diffusers' else f'torch.tensor({labels})'}"
    text = _USES[library].format(**given, conditions=conditions + output)
    text += _CLASSES.format(last=classes - 1, none=classes)
    return "## Use\n\n" + (text if library == "diffusers" else text.replace("\n", "\nimport torch\n", 1))


def image_said(image: dict[str, Any], network: Any) -> tuple[Any, Any]:
    """The channels, and the size, one number or two, of a checkpoint's images: its `image`, or else what its network
    was built for; None where neither says it."""
    arguments = arguments_of(network)
    return image.get("channels", arguments.get("in_channels")), image.get("size", arguments.get("sample_size"))


def makes_latents(config: dict[str, Any]) -> bool:
    """Whether a checkpoint's images are latents: it was trained on some, or its network is of a pipeline of them."""
    image, card = config.get("image"), config.get("card")
    return bool(isinstance(image, dict) and image.get("latents")) or (isinstance(card, dict) and LATENTS in card)


def decoder_of(config: dict[str, Any]) -> str | None:
    """The autoencoder that makes pictures of a checkpoint's latents, as it was named; None where none was."""
    card = config.get("card")
    named = card.get(DECODER) if isinstance(card, dict) else None
    return named if isinstance(named, str) else None


def class_count(network: dict[str, Any]) -> int | None:
    """How many classes a network can be told, besides "none", which has the highest number."""
    embedded = arguments_of(network).get("num_class_embeds")
    return embedded - 1 if isinstance(embedded, int) and embedded > 1 else None


def arguments_of(network: Any) -> dict[str, Any]:
    """The arguments of a network; where an adapter wraps it, those of the network inside."""
    arguments = network.get("arguments") if isinstance(network, dict) else None
    if not isinstance(arguments, dict):
        return {}
    inner = arguments.get("network")
    return arguments_of(inner) if isinstance(inner, dict) else arguments


def public(value: Any) -> Any:
    """JSON values as others may see them: of a path on this machine they are told the last name."""
    if isinstance(value, dict):
        return {k: public(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [public(v) for v in value]
    return _PLACE.sub("", value) if isinstance(value, str) else value


def heading(parameterization: str) -> str:
    """What a model is called by the name of its parameterization."""
    return f"{'An' if parameterization.startswith(tuple('aeioux')) else 'A'} {parameterization} diffusion model"


def _short(config: dict[str, Any]) -> str:
    fields = {k: _short(v) if isinstance(v, dict) else v for k, v in config.items() if k not in ("name", "betas")}
    return config["name"] + (f" ({', '.join(f'{k}={v}' for k, v in fields.items())})" if fields else "")


def _table(title: str, rows: dict[str, Any]) -> str:
    lines = [f"| {_cell(k)} | {_cell(v)} |" for k, v in rows.items()]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *lines])


def _metrics(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(k for row in rows for k in row))
    head = ["## Metrics", "", f"| {' | '.join(map(_cell, columns))} |", f"|{'---|' * len(columns)}"]
    return "\n".join(head + [f"| {' | '.join(_cell(row.get(c, '')) for c in columns)} |" for row in rows])


def _cell(value: Any) -> str:
    """What stands in a table: one line, in one column."""
    return " ".join(str(value).replace("|", "/").split())


def autoencoder_in(decode: str | None) -> str | None:
    """The autoencoder that `--decode` names; None where it says nothing, or that latents are not decoded."""
    return None if decode == AS_THEY_ARE else decode
