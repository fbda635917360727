"""The Triton kernels, one file per op.

In a checkout the files are in ``kernels/``, next to the package, and this module makes them importable. An installed
wheel has the files in this folder, with the ``__init__.py`` of ``kernels/`` in place of this module.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # A type checker does not follow __path__. So import the only kernel module that the package imports by its name.
    from kernels import decoder_sizes as decoder_sizes

__path__ = [str(Path(__file__).resolve().parents[2] / "kernels")]
