"""Measure the time and memory of ops and whole pipelines, and write tables of the results."""
