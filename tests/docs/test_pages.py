"""README and docs say what the results files say, and their links lead somewhere."""

import importlib
import pkgutil
import re
import tokenize
from pathlib import Path

import api_pages
import pytest

import purify_fast
from benchmarks.pages import fill
from benchmarks.prose import WIDTH

ROOT = Path(__file__).parents[2]

RESULTS = ROOT / "benchmarks" / "results"


def test_pages_agree_with_the_results():
    found = fill.check(RESULTS)
    assert not found, "\n".join(found)


def test_tables_are_filled_and_a_block_without_an_end_deletes_no_text(tmp_path):
    page, block = tmp_path / "page.md", "<!-- table: {} -->\n{}<!-- end -->\n"
    page.write_text("A\n" + block.format("one", "old\n") + "B\n" + block.format("two", "kept\n"))
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "one.md").write_text("| a \\1 |\n\n")
    assert fill.fill(page, tmp_path) == ["two"]
    filled = "A\n" + block.format("one", "| a \\1 |\n") + "B\n" + block.format("two", "kept\n")
    assert page.read_text() == filled
    page.write_text(damaged := filled.replace("<!-- end -->", "<!-- ende -->", 1))
    with pytest.raises(ValueError, match="<!-- end -->"):
        fill.fill(page, tmp_path)
    assert page.read_text() == damaged


@pytest.mark.parametrize("page", fill.every_page(), ids=lambda page: page.name)
def test_no_line_of_prose_is_long(page):
    text = re.sub(r"```.*?```|<!--.*?-->", "", page.read_text(), flags=re.S)
    long = [line for line in text.split("\n") if len(line) > WIDTH and not re.match(r"\||!\[|\[!\[", line)]
    assert not long


def test_values_are_read_from_the_studies():
    names = ("carso_mnist/CARSO pipeline, z = 0/worst", "cifar10/AFT/clean")
    text = "keeps " + " % of ".join(f"<!-- value: {name} -->1.0<!-- end -->" for name in names)
    filled, missing = fill.filled(text, RESULTS)
    assert "-->78.6<!-- end -->" in filled and "-->60.2<!-- end -->" in filled and not missing
    with pytest.raises(ValueError, match=r"carso_mnist/CARSO pipeline/such attack .*report.json"):
        fill.filled("<!-- value: carso_mnist/CARSO pipeline/such attack --><!-- end -->", RESULTS)


def test_the_page_of_the_installation_lists_every_environment_variable():
    sources = [ROOT / "setup.py", *(ROOT / "purify_fast").rglob("*.py")]
    read = {name for path in sources for name in re.findall(r"\bPURIFY_FAST_[A-Z_]*[A-Z]\b", path.read_text())}
    listed = re.findall(r"^\| `(PURIFY_FAST_[A-Z_]+)", (ROOT / "docs" / "installation.md").read_text(), re.MULTILINE)
    assert read == set(listed) and listed == sorted(listed)


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("docs") / "api"
    api_pages.write(out)
    return out


def test_every_public_name_has_a_page(folder):
    found = api_pages.packages()
    assert {"purify_fast", "purify_fast.ops", "purify_fast.methods.carso", "purify_fast.protocols"} <= set(found)
    homes = api_pages.pages()
    for package, module in found.items():
        text = (folder / f"{package}.md").read_text()
        for name in api_pages.names(module):
            page = folder / f"{homes[f'{package}.{name}']}.md"
            assert page.is_file(), page
            assert f"[{name}]({page.name})" in text, (package, name)
    assert "](purify_fast.ops.md)" in (folder / "index.md").read_text()


def test_the_whole_package_lists_every_public_folder():
    root = Path(purify_fast.__file__).parent
    folders = {path.parent.name for path in root.glob("*/__init__.py")} - {"cli", "judge", "kernels"}
    assert folders <= set(purify_fast.__all__)
    assert all(importlib.import_module(name).__doc__ for name in api_pages.packages() if name.count(".") == 1)
