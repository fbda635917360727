"""Frozen copies of models: BatchNorm folded, convolutions rewritten, bfloat16 inside."""
