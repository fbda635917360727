"""Importing without the optional parts, and the decisions setup.py takes."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
from loading import module_at

from purify_fast import __version__, _library, zoo

ROOT = Path(__file__).resolve().parents[1]


def run(code: str, **environ: str) -> subprocess.CompletedProcess:
    """A fresh Python; environment variables of ours only as given."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PURIFY_FAST_")}
    env = {**kept, "OMP_NUM_THREADS": "1", **environ}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env, timeout=600)


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def copied(tree: Path) -> Path:
    """A copy of what a build reads, so that it writes nothing into the checkout."""
    unneeded = shutil.ignore_patterns("__pycache__", "models", "*.so")
    for folder in ("purify_fast", "kernels"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=unneeded)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree / name)
    return tree


def setup(tree: Path, *arguments: str) -> None:
    """Call setup.py in a copy of the checkout, without the extension."""
    command = [sys.executable, "setup.py", "--quiet", *arguments]
    environ = os.environ | {"PURIFY_FAST_BUILD": "none"}
    subprocess.run(command, cwd=tree, env=environ, check=True, capture_output=True, timeout=600)


BLOCK_TRITON = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "triton" or name.startswith("triton."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
"""
USE = """
import torch, purify_fast
from purify_fast import ops, _library
x = torch.randn(2, 3, 4, requires_grad=True)
ops.aggregate(x, "peel").sum().backward()
assert x.grad.isfinite().all()
seed = torch.tensor([1])
assert ops.philox(seed, torch.arange(2), 5, stream=ops.Stream.LATENT).shape == (2, 1, 5)
print("loaded" if _library.loaded() else "pure")
"""


@pytest.mark.slow
@pytest.mark.parametrize("triton", [True, False], ids=["triton", "no-triton"])
@pytest.mark.parametrize("extension", [True, False], ids=["extension", "no-extension"])
def test_imports_without_the_optional_parts(triton, extension):
    environ = {} if extension else {"PURIFY_FAST_NO_EXTENSION": "1"}
    done = run(USE if triton else BLOCK_TRITON + USE, **environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ("loaded" if extension and _library.loaded() else "pure")


def test_importing_ops_does_not_import_triton_kernels():
    loaded = "{m for m in sys.modules if m.startswith('purify_fast.kernels.')}"
    done = run(f"import sys, purify_fast.ops\nassert {loaded} == {{'purify_fast.kernels.decoder_sizes'}}")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_backend_of_the_environment_that_is_not_there_is_refused():
    code = "import torch; from purify_fast.ops import aggregate; aggregate(torch.zeros(1, 2, 3))"
    done = run(code, PURIFY_FAST_BACKEND="cpp", PURIFY_FAST_NO_EXTENSION="1")
    assert done.returncode != 0 and "the forced backend 'cpp' has no kernel for tensors on cpu" in done.stderr


def test_the_extension_is_one_file_for_every_python():
    if os.environ.get("PURIFY_FAST_NO_EXTENSION") == "1":
        pytest.skip("the compiled extension is switched off by PURIFY_FAST_NO_EXTENSION=1")
    assert _library.loaded(), _library.load_error
    assert Path(_library.path).name == "_C.abi3.so"


def test_an_installed_package_has_the_kernels_inside(tmp_path):
    """setup.py puts the files of the top folder there; its own folder has only the way to them."""
    setup(copied(tmp_path / "tree"), "build_py", "--build-lib", str(tmp_path / "lib"))
    made = {path.name: path.read_text() for path in (tmp_path / "lib/purify_fast/kernels").iterdir()}
    assert made == {path.name: path.read_text() for path in (ROOT / "kernels").glob("*.py")}
    assert not (tmp_path / "lib" / "kernels").exists()


def test_a_wheel_has_all_cards_of_the_zoo_and_the_weights_of_the_models_on_digits(tmp_path, monkeypatch):
    tree, models = copied(tmp_path / "tree"), ROOT / "purify_fast/zoo/models"
    shutil.copytree(models, tree / "purify_fast/zoo/models")
    (tmp_path / "lib").mkdir()
    setup(tree, "build_py", "--build-lib", str(tmp_path / "lib"), "egg_info", "--egg-base", str(tmp_path))
    made = tmp_path / "lib/purify_fast/zoo/models"
    names = {path.name for path in models.iterdir()}
    assert {path.parent.name for path in made.glob("*/card.json")} == names
    weights = {path.parent.name for path in made.glob("*/*") if path.name != "card.json"}
    assert weights == {name for name in names if name.startswith("digits-")} != names
    # The address of the other weights is made from the package's metadata.
    built = PathDistribution(tmp_path / "purify_fast.egg-info")
    monkeypatch.setattr(zoo, "metadata", lambda name: built.metadata)
    released = (
        rf"https://github\.com/[^/]+(/[^/]+)?/releases/download/v{re.escape(__version__)}/mnist-pgd-at\.safetensors"
    )
    assert re.fullmatch(released, zoo.address("mnist-pgd-at"))


def test_the_source_distribution_has_what_a_build_reads_and_no_more(tmp_path):
    """Tests would be packed by setuptools' default, without the helpers that they import."""
    built = ("csrc/", "kernels/", "purify_fast/")
    read = {*("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in")}
    tracked = set(git("ls-files", "--cached", "--others", "--exclude-standard").split("\n")[:-1])
    sources = {name for name in tracked if name.startswith(built)} | read
    # A build reads the weights of the models on digits alone.
    wanted = {name for name in sources if not name.endswith(".safetensors") or "/digits-" in name}
    for name in {*sources, "tests/test_packaging.py", "benchmarks/__main__.py", "docs/index.md"}:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "tree" / name)
    setup(tmp_path / "tree", "sdist", "--formats", "tar", "--dist-dir", str(tmp_path))
    (archive,) = tmp_path.glob("*.tar")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames() if not file.getmember(name).isdir()}
    made = {name for name in names if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert names - made == wanted


@pytest.fixture(scope="module")
def setup_py():
    return module_at(ROOT / "setup.py", "purify_fast_setup")


def test_modes_when_the_build_is_impossible(setup_py, monkeypatch, capsys):
    def impossible(*args):
        raise setup_py.Impossible("no compiler here")

    monkeypatch.setattr(setup_py, "compiler", impossible)
    assert setup_py.extension("none") == {}
    assert setup_py.extension("auto") == {}
    assert "pure-Python install" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="PURIFY_FAST_BUILD=cpu is impossible: no compiler here"):
        setup_py.extension("cpu")


def test_the_advice_on_the_kernels_can_be_followed_without_a_checkout():
    assert "no-build-isolation .`" in _library.BUILD_HINT and "-e ." not in _library.BUILD_HINT
