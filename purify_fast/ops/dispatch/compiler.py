"""Whether Triton can build what it calls the CUDA driver with: a small C module, for which it needs a C compiler."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path


def missing() -> str | None:
    """What Triton lacks to run any kernel on a GPU, with the way to mend it, in a sentence; None if it lacks nothing.

    Modules that Triton has built before, in its folder of caches, it loads without a compiler.
    """
    if not sys.platform.startswith("linux"):
        # Triton brings its own compiler where it runs elsewhere
        return None
    consequence = "Triton can build no kernel for a GPU without it, so that PyTorch computes every op there"
    # what Triton looks for, in triton/runtime/build.py
    if not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang"))):
        return (
            f"there is no C compiler: neither gcc nor clang is on the PATH, and CC is not set. {consequence}. Install "
            "one (on Debian and Ubuntu: apt-get install gcc), or set CC to its path"
        )
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        return (
            f"{header} is missing, the C header of Python. {consequence}. Install it (on Debian and Ubuntu: apt-get "
            f"install python{sys.version_info[0]}.{sys.version_info[1]}-dev)"
        )
    return None
