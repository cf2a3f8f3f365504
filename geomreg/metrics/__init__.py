"""Geometry metrics: functions, and torchmetrics classes that collect over batches and processes."""

from geomreg.metrics.distortion import Distortion, DistortionBound, distortion_bound
from geomreg.metrics.rsa import RSA, BoundedRSA, RSAInterval, bounded_rsa, rsa, rsa_interval, rsa_of_caches

__all__ = [
    "RSA",
    "BoundedRSA",
    "Distortion",
    "DistortionBound",
    "RSAInterval",
    "bounded_rsa",
    "distortion_bound",
    "rsa",
    "rsa_interval",
    "rsa_of_caches",
]
