"""Prepare a run of README's first commands in an environment with only the packages that the commands need.

`python .ci/first_commands.py FOLDER` writes a script and a folder of packages. The script FOLDER/typed.sh contains the
lines under README's marks ``ci: install`` and ``ci: judge``. In these lines only the address of the repository is
replaced, by the path of this checkout. The folder FOLDER/site has links to PyTorch and the package's other requirements
in the current environment, so that nothing large is downloaded again.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
#: Small packages that README's commands install themselves.
TYPED = {"setuptools", "ninja"}


def block(page: str, mark: str) -> str:
    """The lines of the code block that directly follows a mark. Without exactly one such block, the program ends."""
    found = re.findall(rf"^<!-- ci: {mark} -->\n```[a-z]*\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    if len(found) != 1:
        sys.exit(f"README.md must have one fenced block right under <!-- ci: {mark} -->; it has {len(found)}")
    return found[0]


def typed(page: str, address: Path) -> str:
    """Join the blocks ``install`` and ``judge`` into one script, which installs from ``address``."""
    install, addresses = re.subn(r"git\+https://\S+", f"'git+file://{address}'", block(page, "install"))
    if addresses != 1:
        sys.exit(f"README.md must contain git+https:// once under <!-- ci: install -->; got {addresses}")
    lines = (install + block(page, "judge")).replace("\\\n", " ").splitlines()
    # Stop at the first line that fails, like a person. `set -e` would not stop if the first command of `a && b` fails.
    return "\n".join(f"{line}\n[ $? = 0 ] || exit 1" for line in lines if line.strip()) + "\n"


def required(name: str, extras: frozenset[str] = frozenset()) -> dict[str, frozenset[str]]:
    """All direct and indirect requirements of a package, with their extras. The packages in `TYPED` are left out."""
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
    """Make links in the folder ``site`` to the installed files of these packages."""
    for name in names:
        installed = distribution(name)
        for top in {file.parts[0] for file in installed.files or ()} - {"..", "__pycache__"}:
            place = site / top
            if not place.is_symlink():
                place.symlink_to(installed.locate_file(top))


def main(folder: Path) -> None:
    (folder / "site").mkdir()
    (folder / "typed.sh").write_text(typed((ROOT / "README.md").read_text(encoding="utf-8"), ROOT))
    link([name for name in required("purify-fast") if name != "purify-fast"], folder / "site")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
