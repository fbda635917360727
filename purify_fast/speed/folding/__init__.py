"""Make frozen copies of models for inference: BatchNorms are folded, and the products are computed in bfloat16."""
