"""Measurements that need a GPU, and counts that replace them where there is no GPU."""
