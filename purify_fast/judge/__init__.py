"""Judges models: searches for adversarial images, evaluations, certificates and their reports."""
