"""Says which versions `make compat` runs with; fails unless they are those asked for and the extension is loaded."""

import importlib
import sys

from purify_fast import _library


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
    print(_library.path)
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
