"""Measure the time and memory of ops, convolutions and whole pipelines, and write tables of the results."""
