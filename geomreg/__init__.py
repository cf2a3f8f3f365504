"""geomreg: regularizers that keep the geometry of an embedding space while an encoder learns something new."""

from geomreg.cache import EmbeddingCache
from geomreg.compose import WeightedSum
from geomreg.ensemble import alpha_sweep, interpolate
from geomreg.regularizers import (
    AverageVectorLoss,
    ContextKL,
    ContrastiveReplay,
    CosineAnchor,
    CyclicConsistency,
    DiVE,
    FeatureDistillation,
    FeatureMapDistance,
    FeatureMaps,
    GramStructure,
    PairwiseVectorLoss,
    ProjectionOrthogonality,
    RelationalAngle,
    RelationalDistance,
    SelectiveDistillation,
    SimilarityKL,
    TextEnergy,
    WeightAnchor,
)
from geomreg.statistics import recompute_statistics
from geomreg.step import backward
from geomreg.teacher import Teacher
from geomreg.types import Embeddings, Regularizer, Terms

__version__ = "0.1.0"
__all__ = [
    "AverageVectorLoss",
    "ContextKL",
    "ContrastiveReplay",
    "CosineAnchor",
    "CyclicConsistency",
    "DiVE",
    "EmbeddingCache",
    "Embeddings",
    "FeatureDistillation",
    "FeatureMapDistance",
    "FeatureMaps",
    "GramStructure",
    "PairwiseVectorLoss",
    "ProjectionOrthogonality",
    "Regularizer",
    "RelationalAngle",
    "RelationalDistance",
    "SelectiveDistillation",
    "SimilarityKL",
    "Teacher",
    "Terms",
    "TextEnergy",
    "WeightAnchor",
    "WeightedSum",
    "alpha_sweep",
    "backward",
    "interpolate",
    "recompute_statistics",
]
