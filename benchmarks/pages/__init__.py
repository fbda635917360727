"""Make the tables and numbers of README and docs from the committed results."""
