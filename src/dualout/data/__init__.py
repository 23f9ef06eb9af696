"""Images to train on: data sources by name, and `load`, which gives one as a `Dataset`."""

from dualout.data.arrays import Arrays
from dualout.data.base import SPLITS, Source, open_source
from dualout.data.dataset import Dataset
from dualout.data.digits import Digits
from dualout.data.folder import Folder
from dualout.data.hub import Hub
from dualout.data.idx import Idx
from dualout.data.loader import Batch, Loader
from dualout.data.photos import Photos
from dualout.data.pixels import to_model, to_uint8
from dualout.data.prepare import load
from dualout.registry import discover

__all__ = [
    "SPLITS",
    "Arrays",
    "Batch",
    "Dataset",
    "Digits",
    "Folder",
    "Hub",
    "Idx",
    "Loader",
    "Photos",
    "Source",
    "load",
    "open_source",
    "to_model",
    "to_uint8",
]

discover(__name__, __path__)
