"""Who serves an op: how ops are registered, how kernels are verified and raced, and what is known of this machine."""
