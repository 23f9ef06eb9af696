"""Play with trained models on a web page: samplers, steps and routes side by side, from the same seeds.

The page is served to this machine alone, at 127.0.0.1, unless --host says otherwise; nothing is sent anywhere. Ctrl-C
ends it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from dualout.cli import console
from dualout.cli.options import parse
from dualout.errors import InputError


@dataclass(kw_only=True)
class Options:
    """The options of ``dualout app``."""

    runs: list[str] = field(metadata={"positional": True})
    """Directories of runs or checkpoints, or names of Hugging Face Hub repositories"""
    decode: str | None = None
    """For models of latents: the autoencoder of diffusers that decodes them, a directory or the name of a Hugging Face
    Hub repository, its own or a pipeline's; by default the one named in training"""
    host: str = "127.0.0.1"
    """The address to listen at; 0.0.0.0 lets other machines see the page"""
    port: int | None = None
    """By default the first free one from 7860 on"""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto"""

    def __post_init__(self) -> None:
        if self.port is not None and not 1 <= self.port <= 65535:
            raise InputError(f"--port is a number from 1 to 65535; got {self.port}")


def run(arguments: list[str]) -> int | None:
    """Run the command."""
    options = parse(Options, "app", arguments, __doc__)

    from dualout.app.server import serve
    from dualout.app.studio import Studio
    from dualout.networks.device import device

    studio = Studio(options.runs, device(options.device), options.decode)
    page, address = serve(studio, options.host, options.port)
    console.say(f"{address}  (Ctrl-C ends it)")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        console.say("ended")
    finally:
        page.close(verbose=False)
    return None
