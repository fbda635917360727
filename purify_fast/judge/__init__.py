"""What judges: searches for adversarial images, evaluations, certificates and their reports."""
