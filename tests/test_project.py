"""Facts that several files of the root repeat."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_linters_of_a_commit_and_the_list_of_requirements_are_those_of_the_project():
    """The file of pre-commit and the Makefile repeat what constraints.txt and pyproject.toml say."""
    pinned = dict(re.findall(r"^([\w-]+)==([^;\s]+)", (ROOT / "constraints.txt").read_text(), re.M))
    hooks = re.findall(r"\[([\w-]+)==([\d.]+)\]", (ROOT / ".pre-commit-config.yaml").read_text())
    assert {name for name, _ in hooks} == {"ruff", "clang-format"} and all(pinned[name] == at for name, at in hooks)
    (listed,) = re.findall(r"^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    (made,) = re.findall(r"^REQUIRED := (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r'"([\w-]+)>', listed)) == {"torch", "torchvision", *made.split()}


def test_every_file_names_the_same_version():
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M) == [version]
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[0] in (version, "Unreleased")
    assert f'__version__ = "{version}"' in (ROOT / "purify_fast" / "_version.py").read_text()
