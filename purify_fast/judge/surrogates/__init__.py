"""The surrogates of a model: copies with more useful gradients, from which an adaptive attacker would attack it."""
