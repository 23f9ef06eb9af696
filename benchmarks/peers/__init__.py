"""Other libraries, called the way their own documentation and examples call them; none of their code is here.

A module adapts one library. It has

    NAME                                    how it is called in tables
    version() -> str
    samplers(network, noise, steps)         {name: function that makes images}: `steps` steps with an eps-network
    trainers(network, images)               {name: function that makes one step}: of an eps-network

where `network(x_t, t) -> eps` is a module, t a LongTensor (B,), and the schedule is DDPM's linear one over 1000 steps.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from peers.standin import standing_in

PEERS = ("diffusers_", "lucidrains", "azula_", "kdiffusion", "smalldiffusion_", "authors")


def load(authors: Path | None = None) -> tuple[list[ModuleType], dict[str, str]]:
    """The peers that are installed, and why each of the others is not here."""
    present, absent = [], {}
    for name in PEERS:
        with standing_in():
            peer = importlib.import_module(f"peers.{name}")
            try:
                peer.load(authors) if name == "authors" else peer.load()
            except ImportError as error:
                absent[peer.NAME] = str(error)
                continue
        present.append(peer)
    return present, absent
