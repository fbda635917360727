"""Facts that several files of the root repeat."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def test_the_linters_of_a_commit_and_the_list_of_requirements_are_those_of_the_project():
    """The file of pre-commit and the Makefile repeat what constraints.txt and pyproject.toml say."""
    pinned = dict(re.findall(r"^([\w-]+)==([^;\s]+)", (ROOT / "constraints.txt").read_text(), re.M))
    hooks = re.findall(r"\[([\w-]+)==([\d.]+)\]", (ROOT / ".pre-commit-config.yaml").read_text())
    assert {name for name, _ in hooks} == {"ruff", "clang-format"} and all(pinned[name] == at for name, at in hooks)
    (listed,) = re.findall(r"^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    (made,) = re.findall(r"^REQUIRED := (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r'"([\w-]+)>', listed)) == {"torch", "torchvision", *made.split()}


def test_every_file_names_the_same_versions_of_python_and_torch():
    texts = {name: (ROOT / name).read_text() for name in ("pyproject.toml", "Makefile", "constraints.txt", "setup.py")}
    (python,) = re.findall(r'^requires-python = ">=([\d.]+)"$', texts["pyproject.toml"], re.M)
    (oldest,) = re.findall(r'"torch>=([\d.]+)"', texts["pyproject.toml"])
    (made, triton) = re.findall(r"^OLDEST := torch==([\d.]+)\.0 .* triton==([\d.]+)\.0 ", texts["Makefile"], re.M)[0]
    (pinned,) = re.findall(r"^torch==2\.(\d+)\.", texts["constraints.txt"], re.M)
    (target,) = re.findall(r"TORCH_TARGET_VERSION=0x(\w{4})", texts["setup.py"])
    page = (ROOT / "docs/installation.md").read_text()
    rows = re.findall(
        r"^\| ([\d.]+) \| ([\d.]+) to [\d.]+ \| ([\d.]+) to ([\d.]+) \| ([\d.]+) to [\d.]+ \|$", page, re.M
    )
    (version,) = re.findall(r'^version = "(\d+\.\d+)\.', texts["pyproject.toml"], re.M)
    assert rows[0][:3] == (version, python, oldest) and rows[0][4] == triton
    assert int(oldest.partition(".")[2]) <= int(pinned) <= int(rows[0][3].partition(".")[2])
    assert made == oldest == f"{int(target[:2], 16)}.{int(target[2:], 16)}"


def test_every_file_names_the_same_version():
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M) == [version]
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[0] in (version, "Unreleased")
    assert f'__version__ = "{version}"' in (ROOT / "purify_fast" / "_version.py").read_text()


def test_the_workflow_runs_with_every_supported_python_and_with_the_oldest_pinned_newest_and_nightly_torch():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    runs = {(one["python"], one["torch"]): one["run"] for one in jobs["versions"]["strategy"]["matrix"]["include"]}
    assert {python for python, _ in runs} == {f"3.{minor}" for minor in range(10, 15)}
    assert {torch for _, torch in runs} == {"oldest", "pinned", "newest"} and runs["3.11", "oldest"] == "make compat"
    assert "nightly" in str(jobs["nightly"]["steps"]) and "schedule" in jobs["nightly"]["if"]


def test_read_the_docs_builds_the_pages_without_a_compiler():
    told = yaml.safe_load((ROOT / ".readthedocs.yaml").read_text())
    (install,) = (line for line in told["build"]["jobs"]["install"] if "[docs" in line)
    assert install.startswith("PURIFY_FAST_BUILD=none ") and (ROOT / told["sphinx"]["configuration"]).is_file()
    assert told["sphinx"]["fail_on_warning"]
