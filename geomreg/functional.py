"""Every regularizer as a pure function of embeddings as they come, and the helpers beside them."""

from geomreg.regularizers.average_vector import average_vector_loss
from geomreg.regularizers.cyclic import cyclic_loss
from geomreg.regularizers.dive import dive_loss
from geomreg.regularizers.feature_distillation import cosine_anchor_loss, feature_distillation_loss, selective_distillation_loss
from geomreg.regularizers.feature_maps import feature_map_distance_loss
from geomreg.regularizers.gram import gram_loss
from geomreg.regularizers.pairwise_vector import pairwise_vector_loss
from geomreg.regularizers.projection import projection_orthogonality_loss
from geomreg.regularizers.relational import relational_angle_loss, relational_distance_loss
from geomreg.regularizers.replay import contrastive_loss, retrieve_anchors, sigmoid_contrastive_loss
from geomreg.regularizers.similarity_kl import similarity_kl_loss
from geomreg.regularizers.text_guided import context_embeddings, context_kl_loss, text_energy_loss
from geomreg.regularizers.weight_anchor import fisher_diagonal, weight_anchor_loss

__all__ = [
    "average_vector_loss",
    "context_embeddings",
    "context_kl_loss",
    "contrastive_loss",
    "cosine_anchor_loss",
    "cyclic_loss",
    "dive_loss",
    "feature_distillation_loss",
    "feature_map_distance_loss",
    "fisher_diagonal",
    "gram_loss",
    "pairwise_vector_loss",
    "projection_orthogonality_loss",
    "relational_angle_loss",
    "relational_distance_loss",
    "retrieve_anchors",
    "selective_distillation_loss",
    "sigmoid_contrastive_loss",
    "similarity_kl_loss",
    "text_energy_loss",
    "weight_anchor_loss",
]
