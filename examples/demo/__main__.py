"""Run the demonstration: ``python -m examples.demo`` in the root of the clone, or ``make demo``."""

import tyro

from . import run

if __name__ == "__main__":
    tyro.cli(run, description=run.__doc__)
