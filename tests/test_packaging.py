"""Importing without the optional parts, and the decisions setup.py takes. The tests of facts that several files
repeat, and of a release, follow."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
import yaml
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
    release = rf"https://github\.com/[^/]+(/[^/]+)?/releases/download/v{re.escape(__version__)}"
    assert re.fullmatch(rf"{release}/mnist-pgd-at\.safetensors", zoo.address("mnist-pgd-at"))


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
    assert setup_py.extension("none") == {} and setup_py.extension("auto") == {}
    assert "pure-Python install" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="PURIFY_FAST_BUILD=cpu is impossible: no compiler here"):
        setup_py.extension("cpu")


def test_the_advice_on_the_kernels_can_be_followed_without_a_checkout():
    assert "no-build-isolation .`" in _library.BUILD_HINT and "-e ." not in _library.BUILD_HINT


# -- facts that several files repeat -----------------------------------------------------------------------------------
# Facts that several files of the root repeat.


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
    row = r"^\| ([\d.]+) \| ([\d.]+) to [\d.]+ \| ([\d.]+) to ([\d.]+) \| ([\d.]+) to [\d.]+ \|$"
    rows = re.findall(row, page, re.M)
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


# -- files of a release ------------------------------------------------------------------------------------------------
# A tag publishes files that install, with a description whose links lead somewhere.

WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
#: The files that a release reads beside those that are packed.
NAMES = ("README.md", "CHANGELOG.md", "pyproject.toml", "docs/installation.md")


@pytest.fixture
def release(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / ".ci")
    return module_at(ROOT / ".ci/release.py", "purify_fast_release")


@pytest.fixture
def tree(tmp_path):
    """A checkout of a released version, with the files and folders that the links of README lead to."""
    root = tmp_path / "checkout"
    for path in (*(ROOT / name for name in NAMES), *ROOT.glob("docs/**/*.md"), *ROOT.glob("docs/pictures/*")):
        (root / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / path.relative_to(ROOT))
    for name in ("CONTRIBUTING.md", "CITATION.cff", "LICENSE"):
        (root / name).touch()
    (root / "examples").mkdir()
    closed = (root / "CHANGELOG.md").read_text().replace("## Unreleased\n", f"## {__version__} (2027-01-01)\n", 1)
    (root / "CHANGELOG.md").write_text(closed)
    return root


def test_a_tag_is_the_version_and_its_changes_are_written_down(release, tree):
    release.check_version(tree, f"v{__version__}")
    for tag in ("v9.9.9", __version__):
        with pytest.raises(SystemExit, match=f"the tag must be v{re.escape(__version__)}.* got {re.escape(tag)}"):
            release.check_version(tree, tag)
    changes = tree / "CHANGELOG.md"
    changes.write_text(changes.read_text().replace("\n## ", "\n## Unreleased\n\n- A change.\n\n## ", 1))
    with pytest.raises(SystemExit, match=r"the first heading of CHANGELOG\.md must be .* got Unreleased"):
        release.check_version(tree, f"v{__version__}")


def test_the_notes_of_a_release_are_those_of_its_version(release, tree):
    (tree / "CHANGELOG.md").write_text(
        f"# Changes\n\n## {__version__} (2027-01-01)\n\n- [New](docs/judge.md#a-file).\n\n## 0.0.1\n\n- Old.\n"
    )
    at = f"https://github.com/somebody/something/blob/v{__version__}/docs/judge.md#a-file"
    assert release.notes(tree, "somebody/something") == f"- [New]({at}).\n"


def test_what_is_built_has_the_address_and_readme_has_whole_links(release, tree):
    code = re.compile(r"```.*?```", re.S)
    before = code.findall((tree / "README.md").read_text().replace("ADDRESS", "somebody/something"))
    release.prepare(tree, "somebody/something")
    page = (tree / "README.md").read_text()
    assert "ADDRESS" not in page + (tree / "pyproject.toml").read_text() + (tree / "docs/installation.md").read_text()
    assert code.findall(page) == before
    targets = re.findall(r"\]\(([^)\s]+)\)", code.sub("", page))
    at = f"https://%s/somebody/something/%sv{__version__}/"
    pictures = at % ("raw.githubusercontent.com", "")
    pages, folder = (at % ("github.com", kind) for kind in ("blob/", "tree/"))
    assert all(target.startswith((pictures, pages, folder)) for target in targets)
    assert {f"{pictures}docs/pictures/speed.svg", f"{pages}docs/carso.md", f"{folder}examples"} <= set(targets)
    # The second time finds nothing to do.
    release.prepare(tree, "somebody/something")
    assert (tree / "README.md").read_text() == page
    with pytest.raises(SystemExit, match="the repository must be OWNER/NAME, got somebody"):
        release.prepare(tree, "somebody")


def test_a_wrong_link_ends_a_release(release, tree):
    (tree / "README.md").write_text("[nothing](docs/no_such_page.md)\n")
    with pytest.raises(SystemExit, match=r"a link leads to docs/no_such_page\.md"):
        release.prepare(tree, "somebody/something")


def test_every_action_is_pinned_and_only_jobs_that_publish_may_prove_who_they_are():
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        actions = re.findall(r"uses: (\S+)@(\S+)(.*)", path.read_text())
        assert actions and all(re.fullmatch(r"[0-9a-f]{40}", commit) for _, commit, _ in actions), path
        assert all(re.fullmatch(r" # v\d+\.\d+\.\d+", version) for *_, version in actions), path
    jobs = WORKFLOW["jobs"]
    trusted = {name: job["environment"] for name, job in jobs.items() if "id-token" in job.get("permissions", {})}
    assert trusted == {"publish": "pypi", "publish-testpypi": "testpypi"}


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [False, True], ids=["pure Python", "kernels"])
def test_a_release_installs_from_nothing(release, tmp_path, capfd, kernels):
    """Its files are built, checked, and installed in empty environments, where README's judgements run."""
    for name in ("build", "twine", "readme_renderer"):
        pytest.importorskip(name)
    release.rehearse(tmp_path, kernels=kernels)
    said = capfd.readouterr().out
    assert said.count("README: make your own model faster") == said.count("README: judge") == 2
    assert {path.stem for path in (tmp_path / "dist/weights").iterdir()} >= {"mnist-pgd-at", "digits-pgd-at"}
