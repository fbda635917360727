"""The Triton kernels, one file per op.

In a checkout the files are in ``kernels/``, next to the package. An installed wheel has them in this folder, and its
``__init__.py`` is theirs.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # a type checker does not follow __path__: it reads the one module that the package imports by its name
    from kernels import decoder_sizes as decoder_sizes

__path__ = [str(Path(__file__).resolve().parents[2] / "kernels")]
