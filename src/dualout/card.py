"""The model card of a checkpoint."""

from __future__ import annotations

from typing import Any

_USES = {
    "dualout": """```python
import dualout

denoiser = dualout.Denoiser.from_pretrained("{path}")
noise = dualout.noise(range(16), {shape})
images = dualout.samplers.DDIM(steps=10).sample(denoiser, noise)
```""",
    "diffusers": """```python
from dualout.export import DualOutputPipeline

pipeline = DualOutputPipeline.from_pretrained("{path}")
images = pipeline(batch_size=16, num_inference_steps=10).images
```

The network is an ordinary model of diffusers; only reading its output needs dualout.""",
    "onnx": """```python
import dualout
from dualout.export import OnnxDenoiser

denoiser = OnnxDenoiser("{path}")
noise = dualout.noise(range(16), {shape})
images = dualout.samplers.DDIM(steps=10).sample(denoiser, noise)
```

Or with any ONNX runtime: `model.onnx` takes noisy images `x_t` (B, C, H, W) and their time steps `t` (B,), 0 … T−1, and
gives the clean images `x0` and the noise `eps` that it predicts. Its metadata `dualout` hold the noise schedule.""",
}


def render(config: dict[str, Any], library: str = "dualout") -> str:
    """README.md for a checkpoint's configuration, with the front matter that the Hugging Face Hub reads.

    Args:
        config: schedule, parameterization, network, and what else there is.
        library: what the model is loaded with: dualout, diffusers or onnx.
    """
    card = config.get("card", {})
    parameterization, schedule, network = config["parameterization"], config["schedule"], config["network"]
    image = config.get("image", {})
    size = image.get("size", 32)
    shape = (image.get("channels", 3), *(size if isinstance(size, list) else (size, size)))
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
                "images": " × ".join(map(str, shape)) + " in [−1, 1]",
                **config.get("more", {}),
            },
        ),
        "## Use\n\n" + _USES[library].format(path=card.get("path", "PATH"), shape=shape),
    ]
    sections += [
        _table(title, card[key]) for key, title in (("training", "Training"), ("data", "Data")) if card.get(key)
    ]
    sections += [_metrics(card["metrics"])] if card.get("metrics") else []
    return "\n\n".join(sections) + "\n"


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
