"""Every public name has a page in the reference of the API, and every public package is listed by the whole one."""

import importlib
from pathlib import Path

import api_pages
import pytest

import purify_fast

ROOT = Path(__file__).parents[2]


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
