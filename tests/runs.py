"""What tests of runs share: small ones, and what they leave."""

from __future__ import annotations

import json

import torch

from dualout.checkpoint import read_tensors
from dualout.training import Run, TrainConfig
from dualout.training import checkpoint as files

TIMES = ("images_per_s", "seconds")


def config(out, **fields) -> TrainConfig:
    usual = {"network": "tiny:width=8", "batch_size": 4, "steps": 9, "checkpoint_every": 4, "log_every": 2, "warmup": 3}
    # on a GPU the same sums are not always added up in the same order: its bits are no measure
    return TrainConfig(**(usual | {"device": "cpu", "out": str(out)} | fields))


def trained(out, until: int | None = None, **fields) -> Run:
    """Train to the end, or as a process that is killed in the step after `until`."""
    with Run(config(out, **fields)) as run:
        for step in run:
            if step.index == until:
                break
    return run


def state(out) -> dict[str, torch.Tensor]:
    (_, place), *_ = files.states(out)[::-1]
    found = {f"model/{k}": v for k, v in read_tensors(out / "model.safetensors").items()}
    for name in ("weights", "average", "optimizer"):
        found |= {f"{name}/{k}": v for k, v in read_tensors(place / f"{name}.safetensors").items()}
    return found


def metrics(out) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def same(a, b) -> bool:
    one, two = state(a), state(b)
    return one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())
