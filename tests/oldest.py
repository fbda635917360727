"""Says which versions `make compat` runs with; fails unless they are those asked for and the extension is loaded.

The arguments are requirements such as ``torch==2.11.0``. Where the extension was built for CUDA, it must have the
decoder's kernel.
"""

from __future__ import annotations

import importlib
import sys

from purify_fast import _library, info


def main(requirements: list[str]) -> int:
    wrong = []
    for requirement in requirements:
        name, _, wanted = requirement.partition("==")
        found = importlib.import_module(name).__version__.partition("+")[0]
        print(f"{name} {found}")
        if found != wanted:
            wrong.append(f"{name} is {found}, not {wanted}")
    if not _library.loaded():
        wrong.append(f"the extension does not load: {_library.load_error}")
    built = info.facts(_library.path)
    print(f"{_library.path}: {info.cuda_part(built)}, built with torch {built.get('torch')}")
    if built.get("cuda") and not _library.has_kernel("purify_fast::decode_samples", "CUDA"):
        wrong.append("the extension was built for CUDA and has no kernel of decode_samples")
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
