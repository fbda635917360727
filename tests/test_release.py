"""A tag publishes files that install, with a description whose links lead somewhere."""

import re
import shutil
from pathlib import Path

import pytest
import yaml
from loading import module_at

from purify_fast import __version__

ROOT = Path(__file__).resolve().parents[1]
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
