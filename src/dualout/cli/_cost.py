"""What --dry_run of sample and evaluate prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dualout.cli import console
from dualout.errors import InputError

if TYPE_CHECKING:
    from dualout.evaluation.sampling import Sampling


def print_cost(options: Any, samplings: Sequence[Sampling], images: int, processes: int, more: dict[str, str]) -> None:
    """Print a command's configuration and what making its images will cost.

    Args:
        options: of the command; has batch_size, backend and dry_run.
        samplings: each makes so many images.
        images: of all processes together.
        processes: that share them.
        more: what else is worth knowing, by name.

    Raises:
        InputError: for numbers that cannot be used.
    """
    from dualout.evaluation.cost import cost

    for name, value in (("images", images), ("batch_size", options.batch_size)):
        if value < 1:
            raise InputError(f"--{name} is a whole number, 1 or more; got {value}")
    share = -(-images // processes)
    found = cost(samplings, share, options.batch_size)
    network = samplings[0].model.denoiser.network
    backend = (
        "" if options.backend == "eager" else f"; measured in eager torch, --backend {options.backend} is to be quicker"
    )
    rate = share * len(samplings) / found.seconds
    if (decoder := samplings[0].model.output.decoded_by) is not None:
        image = "×".join(map(str, samplings[0].model.image))
        more = {**more, "decoded": f"to {image} by {decoder}, which is not counted"}
    rows = {
        "network": f"{type(network).__name__}, {found.parameters:,} parameters",
        **more,
        "computed": f"on {samplings[0].device}, in {samplings[0].computed_in.name}, {processes} process(es){backend}",
        "memory": f"about {found.memory / 2**20:,.0f} MiB beside the libraries",
        "work": f"the network looks at an image {found.evaluations * processes:,} times",
        "time": f"about {console.duration(found.seconds)}, {console.rate(rate)}",
    }
    console.dry_run(vars(options), rows)
