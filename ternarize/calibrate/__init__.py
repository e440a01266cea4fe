"""Calibration: activations of a source model decide its trits and scales."""
