"""One file per idea: its function first, its Module second."""

from geomreg.regularizers.average_vector import AverageVectorLoss, average_vector_loss
from geomreg.regularizers.dive import DiVE, dive_loss
from geomreg.regularizers.feature_distillation import FeatureDistillation, feature_distillation_loss
from geomreg.regularizers.pairwise_vector import PairwiseVectorLoss, pairwise_vector_loss

__all__ = [
    "AverageVectorLoss",
    "DiVE",
    "FeatureDistillation",
    "PairwiseVectorLoss",
    "average_vector_loss",
    "dive_loss",
    "feature_distillation_loss",
    "pairwise_vector_loss",
]
