"""Attacks against other attacks, exact answers and broken defences; studies that train and attack models."""
