"""The question of an evaluation: its settings, the model with its images, and the attacks."""
