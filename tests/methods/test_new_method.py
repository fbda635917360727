"""A method is its folder, and no other file of the package knows its name."""

import re
from pathlib import Path

from purify_fast.methods import all_methods

ROOT = Path(__file__).parents[2]


def test_no_other_file_knows_a_method_by_name():
    """What a method needs is in its own folder; the names that users import are the exception."""
    public = {"purify_fast/__init__.py", "purify_fast/methods/recipes.py"}
    imports = re.compile(rf"^\s*(?:from|import) \S*methods\.(?:{'|'.join(all_methods())})\b", re.M)
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "purify_fast").rglob("*.py")
        if imports.search(path.read_text())
        and path.relative_to(ROOT / "purify_fast").parts[:2] not in {("methods", name) for name in all_methods()}
    }
    assert found <= public, found
