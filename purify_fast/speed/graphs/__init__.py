"""Capture repeated steps of attacks as CUDA graphs, and replay them."""
