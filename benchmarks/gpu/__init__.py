"""Measurements that need a GPU, and counts that stand in for them."""
