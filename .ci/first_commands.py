"""README's first commands as a script, and an environment that has no more than a plain installation needs.

`python .ci/first_commands.py FOLDER` writes both. FOLDER/typed.sh has the lines under README's marks ``ci: install``
and ``ci: judge`` as they stand, except that ``git clone`` gets this checkout as its address. FOLDER/site has links to
PyTorch and the package's other requirements in the environment that runs this: nothing large is downloaded again.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
#: Small ones, which README's own lines install.
TYPED = {"setuptools", "ninja"}


def block(page: str, mark: str) -> str:
    """The lines of the block that directly follows a mark; ends with an error if there is none."""
    found = re.findall(rf"^<!-- ci: {mark} -->\n```[a-z]*\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    if len(found) != 1:
        sys.exit(f"README.md must have one fenced block right under <!-- ci: {mark} -->, it has {len(found)}")
    return found[0]


def typed(page: str, address: Path) -> str:
    """Both blocks as one script, which clones from this address."""
    install, clones = re.subn(r"\bgit clone \S+", f"git clone --quiet '{address}'", block(page, "install"))
    if clones != 1:
        sys.exit(f"README.md must clone the repository once under <!-- ci: install -->, it does so {clones} times")
    lines = (install + block(page, "judge")).replace("\\\n", " ").splitlines()
    # a person stops at the first error; `set -e` goes on after the first command of a && b
    return "\n".join(f"{line}\n[ $? = 0 ] || exit 1" for line in lines if line.strip()) + "\n"


def required(name: str, extras: frozenset[str] = frozenset()) -> dict[str, frozenset[str]]:
    """The packages that a package requires, and what these require, each with its extras; without `TYPED`."""
    found: dict[str, frozenset[str]] = {}
    waiting = [(name, extras)]
    while waiting:
        name, extras = waiting.pop()
        if name in TYPED or (name in found and extras <= found[name]):
            continue
        found[name] = extras | found.get(name, frozenset())
        for line in distribution(name).requires or ():
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                waiting.append((needed.name.lower().replace("_", "-"), frozenset(needed.extras)))
    return found


def link(names: list[str], site: Path) -> None:
    """Link what these packages have in their environment's folder of packages."""
    for name in names:
        installed = distribution(name)
        for top in {file.parts[0] for file in installed.files or ()} - {"..", "__pycache__"}:
            place = site / top
            if not place.is_symlink():
                place.symlink_to(installed.locate_file(top))


def main(folder: Path) -> None:
    # its last part names the folder that `git clone` makes
    address = folder / "address" / "purify_fast"
    for place in (address.parent, folder / "site"):
        place.mkdir()
    address.symlink_to(ROOT)
    (folder / "typed.sh").write_text(typed((ROOT / "README.md").read_text(encoding="utf-8"), address))
    link([name for name in required("purify-fast") if name != "purify-fast"], folder / "site")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
