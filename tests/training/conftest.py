"""The files of this folder import what they share from each other."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
