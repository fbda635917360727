"""Triton kernels and their launchers, one file per op. Their import name is ``purify_fast.kernels``."""
