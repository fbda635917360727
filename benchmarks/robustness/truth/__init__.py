"""The distance from the truth: exact decisions, networks that hide a counterexample, and who misses how many."""
