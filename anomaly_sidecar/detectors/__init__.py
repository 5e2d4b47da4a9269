"""Detectors made for GPU inference: each has an own module of pure steps over arrays."""
