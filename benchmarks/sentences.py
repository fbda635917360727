"""Sentences that call a training "as published" and name no recipe, which alone can say what that means."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]

#: The claim, also across a line break and within quotations and lists of Markdown.
CLAIM = re.compile(r"\bas[\s>*]+published\b", re.I)
#: The name of a recipe, such as ``carso/cifar10``; a path that contains it is none.
RECIPE = re.compile(r"(?<![\w/.-])(?:carso|atop|arrest)/\w+")
#: Where one sentence ends and another begins: after a mark, at a blank line, before and after a line of a table, and
#: before an item of a list.
_BREAK = re.compile(r"(?<=[.!?])\s+|\n\s*\n|\n(?=\s*[|#])|(?<=\|)\s*\n|\n(?=\s*(?:[-*+]|\d+\.)\s)")
_GENERATED = ("api", "generated")


def claims(text: str) -> list[tuple[int, str]]:
    """The sentences of a text that claim without naming a recipe, each with its line.

    Args:
        text: Markdown, or one sentence.
    """
    found, start = [], 0
    for end in [*(match.end() for match in _BREAK.finditer(text)), len(text)]:
        sentence, first = text[start:end], start
        start = end
        if (claim := CLAIM.search(sentence)) and not RECIPE.search(sentence):
            found.append((text.count("\n", 0, first + claim.start()) + 1, " ".join(sentence.split())))
    return found


def check(root: Path = ROOT) -> list[str]:
    """What README, changes, docs, docstrings and the titles of the zoo's cards claim without naming a recipe.

    Args:
        root: the repository.

    Returns:
        One line for each, with file, line and sentence.
    """
    docs = root / "docs"
    pages = [path for path in sorted(docs.rglob("*.md")) if path.relative_to(docs).parts[0] not in _GENERATED]
    found = []
    sources = sorted((root / "purify_fast").rglob("*.py"))
    for path in [root / "README.md", root / "CHANGELOG.md", *pages, *sources]:
        text = path.read_text()
        found += [(path, line, sentence) for line, sentence in claims(text)]
    for card in sorted((root / "purify_fast" / "zoo" / "models").glob("*/card.json")):
        lines = card.read_text().splitlines()
        line = next(number for number, text in enumerate(lines, 1) if text.lstrip().startswith('"title"'))
        found += [(card, line, sentence) for _, sentence in claims(json.loads("\n".join(lines))["title"])]
    return [
        f"{path.relative_to(root)}:{line}: says as published, and names no recipe such as carso/cifar10: {sentence}"
        for path, line, sentence in found
    ]
