"""`python -m benchmarks`: measurements of every op's gain, and the tables made from them."""

from pathlib import Path

#: The committed results, a folder for each device and one for the studies.
RESULTS = Path(__file__).parent / "results"
