"""From images to vectors whose distributions are compared: one kind a file, found by name."""

from dualout.evaluation.features.base import Features, NetworkFeatures
from dualout.evaluation.features.classifier import Classifier, Digits, SmallClassifier
from dualout.evaluation.features.convolutions import Random
from dualout.evaluation.features.inception import Inception
from dualout.evaluation.features.lite0 import Lite0
from dualout.evaluation.features.pixels import Pixels
from dualout.registry import discover

__all__ = [
    "Classifier",
    "Digits",
    "Features",
    "Inception",
    "Lite0",
    "NetworkFeatures",
    "Pixels",
    "Random",
    "SmallClassifier",
]

discover(__name__, __path__)
