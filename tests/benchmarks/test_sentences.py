"""A training is called as published only beside the recipe that it followed."""

import json
from pathlib import Path

import pytest

from benchmarks.pages import fill

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One, two. Here CARSO was trained as published, on digits. It follows `carso/cifar10`.", 1),
        ("> trained as\n> published.", 1),
        ("| CARSO as published | 48.4 |\n| carso/cifar10 | 1.0 |", 1),
        ("- It is AToP As Published\n- `atop/cifar_rt2` is a recipe", 1),
        ("trained as published by benchmarks/results/carso/cifar10.py", 1),
        ("Trained as\npublished,\nwhich is `atop/cifar_rt2` in everything, it keeps 1.5 %.", 0),
        ("It was published in 2024, as everyone knows.", 0),
        ("| as published | a training that followed arrest/resnet18 |", 0),
    ],
)
def test_a_claim_without_its_recipe_is_found(text, count):
    assert len(fill.claims(text)) == count


def test_the_check_names_file_line_and_sentence(tmp_path, monkeypatch):
    card = tmp_path / "purify_fast" / "zoo" / "models" / "one" / "card.json"
    for path in (card, tmp_path / "docs" / "deep" / "page.md", tmp_path / "docs" / "api" / "made.md"):
        path.parent.mkdir(parents=True)
    card.write_text(json.dumps({"name": "one", "title": "CARSO, trained as published."}, indent=1))
    (tmp_path / "docs" / "deep" / "page.md").write_text("# A page\n\nAll is well. AToP as\npublished loses.\n")
    (tmp_path / "docs" / "api" / "made.md").write_text("As published.")
    (tmp_path / "README.md").write_text("CARSO as published (`carso/cifar10`).")
    (tmp_path / "CHANGELOG.md").write_text("- As published.")
    (tmp_path / "purify_fast" / "made.py").write_text('"""AToP as published."""')
    what = "says as published, and names no recipe such as carso/cifar10"
    assert fill.check_claims(tmp_path) == [
        f"CHANGELOG.md:1: {what}: - As published.",
        f"docs/deep/page.md:3: {what}: AToP as published loses.",
        f'purify_fast/made.py:1: {what}: """AToP as published."""',
        f"purify_fast/zoo/models/one/card.json:3: {what}: CARSO, trained as published.",
    ]
    monkeypatch.setattr(fill, "check_claims", lambda: ["README.md:1: found"])
    assert "README.md:1: found" in fill.check(ROOT / "benchmarks" / "results")
