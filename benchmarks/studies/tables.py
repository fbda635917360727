"""The digits study as tables and a picture."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from purify_fast._files import atomic, write_text

from . import over_seeds

_COLUMNS = {"clean": "clean", "pgd": "PGD", "autoattack": "+ AutoAttack"}


def _by_row(results: Sequence[dict]) -> dict[str, dict[int, dict]]:
    rows: dict[str, dict[int, dict]] = {}
    for result in results:
        rows.setdefault(result["name"], {})[result["seed"]] = result
    return rows


def _base(name: str) -> str:
    return "base, L2" if name.endswith("L2") else "base"


def markdown(results: Sequence[dict], notes: Sequence[str] = ()) -> str:
    """One line per row of the study; differences are to the base of the same seed."""
    rows = _by_row(results)
    lines = [
        *notes,
        "",
        "| model | clean | PGD | + AutoAttack | difference to base | K draws, clean | K draws, attacked | KL, nats "
        "| parameters | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, seeds in rows.items():
        got = list(seeds.values())
        base = rows.get(_base(name), {})
        both = [s for s in seeds if s in base and name != _base(name)]
        change = over_seeds([seeds[s]["autoattack"] - base[s]["autoattack"] for s in both]) if both else "-"

        def mean(key, got=got, places=0):
            known = [result[key] for result in got if key in result]
            return f"{statistics.fmean(known):,.{places}f}" if known else "-"

        bad = any(r.get("gradients") == "BAD" for r in got)
        cells = [
            name + (" (gradients unhealthy)" if bad else ""),
            *(over_seeds([r[key] for r in got]) for key in _COLUMNS),
            change,
        ]
        cells += [over_seeds([r[k] for r in got]) if k in got[0] else "-" for k in ("clean_draws", "pgd_draws")]
        cells += [mean("kl", places=2), mean("parameters"), str(len(got))]
        lines.append("| " + " | ".join(cells) + " |")
    ranked = [result for result in results if "layers" in result]
    if ranked:
        lines += [
            "",
            "| layer | probe, attacked | image explained, attacked | drift | features |",
            "|---|" + 4 * "---|",
        ]
        names = [score["layer"] for score in ranked[0]["layers"]]
        for name in names:
            own = [next(score for score in r["layers"] if score["layer"] == name) for r in ranked]
            cells = [over_seeds([score[key] for score in own]) for key in ("probe", "image")]
            drift = statistics.fmean(score["drift"] for score in own)
            lines.append(f"| {name} | {' | '.join(cells)} | {drift:.2f} | {own[0]['features']} |")
    return "\n".join(lines).strip() + "\n"


def picture(results: Sequence[dict], path: Path) -> bool:
    """Clean against robust accuracy, a point per model and seed; False without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    rows = {name: seeds for name, seeds in _by_row(results).items() if not name.endswith("L2")}
    figure, axis = pyplot.subplots(figsize=(9, 0.32 * len(rows) + 1.2))
    for line, seeds in enumerate(rows.values()):
        for key, colour in (("clean", "tab:green"), ("pgd", "tab:orange"), ("autoattack", "tab:red")):
            values = [100 * result[key] for result in seeds.values()]
            axis.scatter(values, [line] * len(values), s=16, color=colour, label=_COLUMNS[key] if line == 0 else None)
    base = rows.get("base", {})
    if base:
        axis.axvline(100 * statistics.fmean(r["autoattack"] for r in base.values()), color="tab:red", linewidth=0.8)
    axis.set(yticks=range(len(rows)), yticklabels=list(rows), xlabel="accuracy, %", xlim=(0, 100))
    axis.invert_yaxis()
    axis.legend(fontsize=8, loc="lower center", ncols=3, bbox_to_anchor=(0.5, 1))
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=120, bbox_inches="tight", metadata={"Software": None}, format="png")
    pyplot.close(figure)
    return True


def write(results: Sequence[dict], folder: Path, name: str, notes: Sequence[str] = ()) -> Path:
    """``name.json``, ``name.md`` and ``name.png`` in ``folder``."""
    write_text(folder / f"{name}.json", json.dumps(list(results), indent=1) + "\n")
    write_text(folder / f"{name}.md", markdown(results, notes))
    picture(results, folder / f"{name}.png")
    return folder / f"{name}.md"


_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.S)


def fill(page: Path, folder: Path) -> list[str]:
    """Put each ``folder/NAME.md`` into the page's block ``<!-- table: NAME -->``; returns the names without a file."""
    missing: list[str] = []

    def block(found: re.Match) -> str:
        path = folder / f"{found[2]}.md"
        if not path.is_file():
            missing.append(found[2])
            return found[0]
        return f"{found[1]}{path.read_text().strip()}\n{found[3]}"

    write_text(page, _BLOCK.sub(block, page.read_text()))
    return missing
