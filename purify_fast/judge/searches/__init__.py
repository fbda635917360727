"""The attacks that only a judge runs, and what they share."""
