"""The question of an evaluation: its settings, the model with its images, the attacks, and the claim to test."""
