"""Measure on a GPU. Without a GPU, count the operators that a training step would launch."""
