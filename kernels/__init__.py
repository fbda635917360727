"""Triton kernels and their launchers, one file per op; imported as ``purify_fast.kernels``."""
