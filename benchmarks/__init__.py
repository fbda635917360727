"""`python -m benchmarks`: what every op gains, measured, and the tables made from it."""

from pathlib import Path

#: The committed results, a folder for each device and one for the studies.
RESULTS = Path(__file__).parent / "results"
