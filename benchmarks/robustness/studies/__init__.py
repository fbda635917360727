"""Studies of what makes a defence robust: ``python -m benchmarks study NAME``."""
