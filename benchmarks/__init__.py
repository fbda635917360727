"""`python -m benchmarks`: what every op gains, measured, and the tables made from it."""
