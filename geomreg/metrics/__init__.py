"""Geometry metrics: functions, and torchmetrics classes that collect over batches and processes."""

from geomreg.metrics.distortion import Distortion, DistortionBound, distortion_bound
from geomreg.metrics.rsa import RSA, rsa

__all__ = ["RSA", "Distortion", "DistortionBound", "distortion_bound", "rsa"]
