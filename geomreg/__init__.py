"""geomreg: regularizers that keep the geometry of an embedding space while an encoder learns something new."""

from geomreg.compose import WeightedSum
from geomreg.ensemble import alpha_sweep, interpolate
from geomreg.regularizers import AverageVectorLoss, DiVE, FeatureDistillation, PairwiseVectorLoss
from geomreg.teacher import Teacher
from geomreg.types import Embeddings, Regularizer, Terms

__version__ = "0.1.0"
__all__ = [
    "AverageVectorLoss",
    "DiVE",
    "Embeddings",
    "FeatureDistillation",
    "PairwiseVectorLoss",
    "Regularizer",
    "Teacher",
    "Terms",
    "WeightedSum",
    "alpha_sweep",
    "interpolate",
]
