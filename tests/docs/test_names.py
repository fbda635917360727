"""Every dotted name of the package in the pages, in docstrings and in comments exists."""

import pkgutil
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAME = re.compile(r"(?<![\w./-])purify_fast(?:\.[A-Za-z_]\w*)+")
#: The library of the compiled kernels, which torch loads, is no module, and is absent in pure Python.
LIBRARY = "purify_fast._C"
#: Endings of file names, such as purify_fast.toml.
SUFFIXES = {"egg", "json", "log", "md", "py", "so", "toml", "yaml"}
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md"))]
SOURCES = sorted((ROOT / "purify_fast").rglob("*.py"))


def exists(name):
    """Import the longest part that is a module, and read the other parts as attributes or fields of classes."""
    *path, last = name.split(".")
    try:
        pkgutil.resolve_name(name)
    except (ModuleNotFoundError, AttributeError):
        return len(path) > 1 and last in getattr(pkgutil.resolve_name(".".join(path)), "__annotations__", {})
    return True


def wrong_names(text):
    names = {name for name in NAME.findall(text) if name.rpartition(".")[2] not in SUFFIXES and name != LIBRARY}
    return sorted(name for name in names if not exists(name))


def text_of(path):
    """A page, or the comments and strings of a source."""
    if path.suffix == ".py":
        with tokenize.open(path) as file:
            kinds = tokenize.COMMENT, tokenize.STRING
            return "\n".join(token.string for token in tokenize.generate_tokens(file.readline) if token.type in kinds)
    return path.read_text()


@pytest.mark.parametrize("paths", [PAGES, SOURCES], ids=["pages", "sources"])
def test_every_name_exists(paths):
    wrong = {str(path.relative_to(ROOT)): names for path in paths if (names := wrong_names(text_of(path)))}
    assert not wrong
