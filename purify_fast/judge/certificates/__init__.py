"""Certificates by randomized smoothing: bounds from below for the robust accuracy, beside attacks from above."""
