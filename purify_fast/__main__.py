"""``python -m purify_fast``: the same program as ``purify-fast``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
