"""Making many images, and scoring them against real ones."""

from dualout.evaluation.autoencoder import Autoencoder
from dualout.evaluation.features import Features, NetworkFeatures
from dualout.evaluation.generate import generate
from dualout.evaluation.metrics import frechet, kid, precision_recall, scores
from dualout.evaluation.model import Model
from dualout.evaluation.reference import Reference
from dualout.evaluation.sampling import Sampling, build_sampler
from dualout.evaluation.scoring import Results, Scoring
from dualout.evaluation.statistics import Statistics

__all__ = [
    "Autoencoder",
    "Features",
    "Model",
    "NetworkFeatures",
    "Reference",
    "Results",
    "Sampling",
    "Scoring",
    "Statistics",
    "build_sampler",
    "frechet",
    "generate",
    "kid",
    "precision_recall",
    "scores",
]
