"""Kernels, convolutions and whole pipelines: races of time and memory, and their tables."""
