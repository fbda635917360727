"""The program ``purify-fast``, which is also ``python -m purify_fast``."""

import signal
import sys


def program() -> int:
    """Run the words of this process as a command, and return the exit status."""
    # Until PyTorch is imported, Ctrl-C ends the program at once: an exception would end in a traceback of the imports.
    # The program that starts this one may have told it to ignore Ctrl-C.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .cli import main

    return main()


if __name__ == "__main__":
    sys.exit(program())
