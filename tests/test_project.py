"""The habits of the project: `make quick`, and facts that several files of the root repeat."""

import re
from pathlib import Path

import pytest
from loading import module_at

ROOT = Path(__file__).parents[1]


@pytest.fixture
def quick():
    return module_at(ROOT / ".ci" / "quick.py")


@pytest.mark.parametrize(
    ("file", "tests"),
    [
        ("purify_fast/attacks/pgd.py", "tests/attacks"),
        ("purify_fast/methods/carso/task.py", "tests/methods/carso"),
        ("purify_fast/methods/loading.py", "tests/methods"),
        # no folder of tests is as deep
        ("purify_fast/judge/run/cache.py", "tests/judge"),
        ("purify_fast/nn.py", "tests/test_nn.py"),
        ("purify_fast/_memory.py", "tests/test_memory.py"),
        ("kernels/pgd_step.py", "tests/interpreter tests/aot"),
        ("csrc/cpu/stitch.cpp", "tests/cpp tests/ops"),
        ("tests/speed/test_copies.py", "tests/speed"),
        ("tests/test_core.py", "tests/test_core.py"),
        ("benchmarks/pages/fill.py", "tests/benchmarks"),
        ("docs/faq.md", "tests/docs"),
        ("tests/small_models.py", ""),
        ("purify_fast/protocols.py", ""),
        ("LICENSE", ""),
    ],
)
def test_the_tests_of_a_file(quick, file, tests):
    assert " ".join(quick.tests_of(file)) == tests


def test_every_folder_of_the_package_has_tests_that_exist(quick):
    folders = [path.parent for path in (ROOT / "purify_fast").glob("*/__init__.py")]
    named = [tests for path in folders for tests in quick.tests_of(f"purify_fast/{path.name}/__init__.py")]
    named += [tests for every in quick.ELSEWHERE.values() for tests in every]
    assert len(named) > len(folders) - 2 and all((ROOT / tests).exists() for tests in named)
    assert all((ROOT / name).exists() for name in quick.ELSEWHERE)


def test_what_runs_is_said_and_nothing_to_run_is_no_success(quick, monkeypatch, capsys):
    files = ["purify_fast/attacks/pgd.py", "tests/attacks/test_pgd.py", "kernels/stitch.py", "csrc/core/stitch.h"]
    answers = {"branch": ["  main"], "merge-base": ["0123456789"], "diff": [*files, "LICENSE"]}
    # a new folder of tests runs with the folder above it
    answers["ls-files"] = ["tests/attacks/new/test_a.py"]
    monkeypatch.setattr(quick, "git", lambda command, *_: answers[command])
    ran = []

    class Done:
        returncode = 0

    monkeypatch.setattr(quick.subprocess, "run", lambda command, env, **_: ran.append((command, env)) or Done)
    assert quick.main(None) == 0
    said = capsys.readouterr().out
    folders = ["tests/aot", "tests/attacks", "tests/cpp", "tests/interpreter", "tests/ops"]
    assert [line.split()[1] for line in said.split("\n") if line.startswith("runs ")] == folders
    assert "no tests of its own: LICENSE" in said and "6 changed files" in said
    (cpp, _), (plain, usual), (interpreter, environ) = ran
    assert cpp == ["make", "test-cpp"] and plain[-3:] == ["tests/aot", "tests/attacks", "tests/ops"]
    assert "TRITON_INTERPRET" not in usual and environ["TRITON_INTERPRET"] == "1"
    assert interpreter[-1] == "tests/interpreter"
    answers.update({"diff": ["LICENSE"], "ls-files": []})
    assert quick.main("v0.1.0") == 1 and "runs nothing" in capsys.readouterr().out
    answers["diff"] = files
    Done.returncode = 5
    assert quick.main(None) == 5


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
