"""`python -m benchmarks` measures the speed and the robustness of the package, and writes tables of the results."""

from pathlib import Path

#: The folder of the committed results. It has a folder for each measured device, and the folder "studies".
RESULTS = Path(__file__).parent / "results"
