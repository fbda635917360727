"""A digits study as tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from purify_fast._files import write_text
from purify_fast.evaluation.show.tables import markdown_table

from . import over_seeds


@dataclass(frozen=True)
class Layout:
    """A digits study's columns: keys of the results and their heads.

    Attributes:
        main: accuracies that every row has.
        compared: those of them whose differences to the base are shown.
        more: accuracies that some rows have.
        numbers: of other kinds, with their decimals.
    """

    main: dict[str, str]
    compared: dict[str, str]
    more: dict[str, str]
    numbers: dict[str, tuple[str, int]]


def _by_row(results: Sequence[dict]) -> dict[str, dict[int, dict]]:
    rows: dict[str, dict[int, dict]] = {}
    for result in results:
        rows.setdefault(result["name"], {})[result["seed"]] = result
    return rows


def _base(name: str) -> str:
    return "base, L2" if name.endswith("L2") else "base"


def markdown(results: Sequence[dict], notes: Sequence[str], layout: Layout) -> str:
    """One line per row of the study; differences are to the base of the same seed."""
    rows = _by_row(results)
    numbers = [head for head, _ in layout.numbers.values()]
    heads = (layout.main, layout.compared, layout.more)
    head = ["model", *(title for some in heads for title in some.values()), *numbers, "seeds"]
    body = []
    for name, seeds in rows.items():
        got = list(seeds.values())
        base = rows.get(_base(name), {})
        both = [s for s in seeds if s in base and name != _base(name)]
        changes = {key: [seeds[s][key] - base[s][key] for s in both] for key in layout.compared}

        def mean(key, places, got=got):
            known = [result[key] for result in got if key in result]
            return f"{statistics.fmean(known):,.{places}f}" if known else "-"

        bad = any(r.get("gradients") == "BAD" for r in got)
        cells = [
            name + (" (gradients unhealthy)" if bad else ""),
            *(over_seeds([r[key] for r in got]) for key in layout.main),
            *(over_seeds(change) if both else "-" for change in changes.values()),
        ]
        cells += [over_seeds([r[k] for r in got]) if k in got[0] else "-" for k in layout.more]
        cells += [mean(key, places) for key, (_, places) in layout.numbers.items()] + [str(len(got))]
        body.append(cells)
    lines = [*notes, "", *markdown_table(head, body)]
    ranked = [result for result in results if "layers" in result]
    if ranked:
        layers = []
        names = [score["layer"] for score in ranked[0]["layers"]]
        for name in names:
            own = [next(score for score in r["layers"] if score["layer"] == name) for r in ranked]
            cells = [over_seeds([score[key] for score in own]) for key in ("probe", "image")]
            drift = statistics.fmean(score["drift"] for score in own)
            layers.append([name, *cells, f"{drift:.2f}", str(own[0]["features"])])
        head = ["layer", "probe, attacked", "image explained, attacked", "drift", "features"]
        lines += ["", *markdown_table(head, layers)]
    return "\n".join(lines).strip() + "\n"


def write(results: Sequence[dict], folder: Path, name: str, notes: Sequence[str], layout: Layout) -> Path:
    """``name.json`` and ``name.md`` in ``folder``."""
    write_text(folder / f"{name}.json", json.dumps(list(results), indent=1) + "\n")
    write_text(folder / f"{name}.md", markdown(results, notes, layout))
    return folder / f"{name}.md"
