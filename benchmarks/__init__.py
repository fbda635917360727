"""`python -m benchmarks` measures the speed and the robustness of the package, and writes tables of the results."""

from pathlib import Path

#: The committed results. Each measured device has a folder, and the studies have the folder "studies".
RESULTS = Path(__file__).parent / "results"
