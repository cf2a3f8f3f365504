"""Geometry metrics: functions, and torchmetrics classes that collect over batches and processes."""

from geomreg.metrics.agreement import ZeroShotAgreement, ZeroShotBound, zero_shot_bound
from geomreg.metrics.cka import LinearCKA, linear_cka
from geomreg.metrics.distortion import Distortion, DistortionBound, distortion_bound
from geomreg.metrics.drift import Drift, DriftParts, drift
from geomreg.metrics.modality_gap import ModalityGap, modality_gap
from geomreg.metrics.monitor import Alarm, DriftMonitor
from geomreg.metrics.neighbours import MutualKNN, mutual_knn
from geomreg.metrics.procrustes import Procrustes, ProcrustesParts, procrustes
from geomreg.metrics.rsa import RSA, BoundedRSA, RSAInterval, bounded_rsa, rsa, rsa_interval
from geomreg.metrics.rsa_caches import rsa_of_caches
from geomreg.metrics.uniformity import AlignmentUniformity, AlignmentUniformityParts, alignment, uniformity
from geomreg.options import check_options_of

__all__ = [
    "RSA",
    "Alarm",
    "AlignmentUniformity",
    "AlignmentUniformityParts",
    "BoundedRSA",
    "Distortion",
    "DistortionBound",
    "Drift",
    "DriftMonitor",
    "DriftParts",
    "LinearCKA",
    "ModalityGap",
    "MutualKNN",
    "Procrustes",
    "ProcrustesParts",
    "RSAInterval",
    "ZeroShotAgreement",
    "ZeroShotBound",
    "alignment",
    "bounded_rsa",
    "distortion_bound",
    "drift",
    "linear_cka",
    "modality_gap",
    "mutual_knn",
    "procrustes",
    "rsa",
    "rsa_interval",
    "rsa_of_caches",
    "uniformity",
    "zero_shot_bound",
]

check_options_of(
    RSA, AlignmentUniformity, Distortion, Drift, DriftMonitor, LinearCKA, ModalityGap, MutualKNN, Procrustes, ZeroShotAgreement
)  # fmt: skip
