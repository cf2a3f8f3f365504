"""One file per idea: its function first, its Module second."""

from geomreg.options import check_options_of
from geomreg.regularizers.average_vector import AverageVectorLoss
from geomreg.regularizers.cyclic import CyclicConsistency
from geomreg.regularizers.dive import DiVE
from geomreg.regularizers.feature_distillation import CosineAnchor, FeatureDistillation, SelectiveDistillation
from geomreg.regularizers.feature_maps import FeatureMapDistance, FeatureMaps
from geomreg.regularizers.gram import GramStructure
from geomreg.regularizers.pairwise_vector import PairwiseVectorLoss
from geomreg.regularizers.projection import ProjectionOrthogonality
from geomreg.regularizers.relational import RelationalAngle, RelationalDistance
from geomreg.regularizers.replay import ContrastiveReplay
from geomreg.regularizers.similarity_kl import SimilarityKL
from geomreg.regularizers.text_guided import ContextKL, TextEnergy
from geomreg.regularizers.weight_anchor import WeightAnchor

__all__ = [
    "AverageVectorLoss",
    "ContextKL",
    "ContrastiveReplay",
    "CosineAnchor",
    "CyclicConsistency",
    "DiVE",
    "FeatureDistillation",
    "FeatureMapDistance",
    "FeatureMaps",
    "GramStructure",
    "PairwiseVectorLoss",
    "ProjectionOrthogonality",
    "RelationalAngle",
    "RelationalDistance",
    "SelectiveDistillation",
    "SimilarityKL",
    "TextEnergy",
    "WeightAnchor",
]

check_options_of(*(globals()[name] for name in __all__))
