"""README's first commands: what `.ci/run` makes a script of, and where it runs."""

import subprocess
from pathlib import Path

import pytest
from loading import module_at

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def first_commands():
    return module_at(ROOT / ".ci" / "first_commands.py")


def page(install: str, judge: str) -> str:
    return f"<!-- ci: install -->\n```\n{install}```\n\ntext\n\n<!-- ci: judge -->\n```bash\n{judge}```\n"


def test_the_script_ends_at_the_first_line_that_fails(first_commands, tmp_path):
    clone = "a=git+https://example.org/x\ngit clone ${a#git+} there && cd there\n"
    text = page(f"{clone}echo \\\n  went on\n", "echo judged\n")
    script = first_commands.typed(text, tmp_path / "nothing")
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == "", done
    subprocess.run(["git", "init", "--quiet", str(tmp_path / "nothing")], check=True, timeout=60)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "went on\njudged\n", done


def test_the_environment_has_what_the_package_requires_and_no_more(first_commands, tmp_path):
    names = first_commands.required("purify-fast")
    assert {"torch", "torchvision", "numpy", "tyro"} < set(names)
    # of the extras, of the tests, and what README's own line installs
    assert not {"scikit-learn", "matplotlib", "pyautoattack", "scipy", "pytest", "setuptools", "ninja"} & set(names)
    first_commands.link(["torch", "jinja2"], tmp_path)
    assert (tmp_path / "torch" / "__init__.py").is_file() and list(tmp_path.glob("jinja2-*.dist-info/METADATA"))
