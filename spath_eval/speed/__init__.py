"""Measured speed: stopwatch ratios of dense and sparse, beside the ceiling that arithmetic allows."""
