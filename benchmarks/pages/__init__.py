"""The tables and numbers of README and docs, made from the committed results."""
