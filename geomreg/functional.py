"""Every regularizer as a pure function of embeddings as they come."""

from geomreg.regularizers.average_vector import average_vector_loss
from geomreg.regularizers.dive import dive_loss
from geomreg.regularizers.feature_distillation import feature_distillation_loss
from geomreg.regularizers.pairwise_vector import pairwise_vector_loss

__all__ = ["average_vector_loss", "dive_loss", "feature_distillation_loss", "pairwise_vector_loss"]
