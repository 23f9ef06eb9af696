"""NaN and infinities put into the loss, the gradients and the weights of a training, at a random step.

It must stop with the step and the images named, save nothing of it, and go on to the same bits when it is given again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch

from campaign import subjects
from campaign.harness import Count, box, tried, scaled
from campaign.kills import bits

CASES = 60
VALUES = (float("nan"), float("inf"), -float("inf"))


def run(part: float, seed: int) -> Iterator[Count]:
    """One count for each place."""
    subjects.trained()
    draw = random.Random(seed)
    with box() as where:
        tried(subjects.training(where.out, 6), where)
        expected = bits(where.out)
    for place in ("loss", "gradients", "weights"):
        share, failures = scaled(CASES // 3, part), []
        for number in range(share):
            step, value = draw.randrange(1, 7), draw.choice(VALUES)
            with box() as where:
                command = subjects.training(where.out, 6)
                outcome, wrong = tried(
                    command, where, codes=(2,), keeps_out=True, seconds=120,
                    before=lambda place=place, step=step, value=value: put(place, step, value),
                )  # fmt: skip
                if "not finite" not in outcome.err and "no number" not in outcome.err:
                    wrong.append(f"does not say so: {outcome.said}")
                _, again = tried(command, where, codes=(0,), seconds=120)
                if bits(where.out) != expected:
                    again.append("goes on to other bits")
                failures += [f"case {number}, {value} at step {step}: {fault}" for fault in (*wrong, *again)]
        yield Count(f"not finite: {place}", share, failures)


def put(place: str, step: int, value: float) -> None:
    """Put a value in at a step, in the forked process."""
    from dualout.denoiser import Denoiser, Loss
    from dualout.training.learner import Learner

    if place == "loss":
        loss, calls = Denoiser.loss, [0]

        def bad_loss(self: Denoiser, *arguments: Any, **conditions: Any) -> Loss:
            found = loss(self, *arguments, **conditions)
            calls[0] += 1
            return found if calls[0] != step else Loss(found.total * value, found.parts)

        Denoiser.loss = bad_loss  # type: ignore[method-assign]
        return
    update = Learner.update

    def bad_update(self: Learner) -> Any:
        parameter = next(iter(self.parameters.values()))
        if place == "gradients" and self.step == step - 1 and parameter.grad is not None:
            parameter.grad.view(-1)[0] = value
        result = update(self)
        if place == "weights" and self.step == step:
            with torch.no_grad():
                parameter.view(-1)[0] = value
        return result

    Learner.update = bad_update  # type: ignore[method-assign]
