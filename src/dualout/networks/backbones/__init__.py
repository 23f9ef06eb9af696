"""The recipes' networks: one family a file, found by name."""

from dualout.networks.backbones.base import Backbone
from dualout.registry import discover

__all__ = ["Backbone"]

discover(__name__, __path__)
