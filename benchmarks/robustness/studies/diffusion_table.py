"""Make the tables of the study of diffusion purifiers, and sentences from their numbers, for docs/diffusion.md.

An outcome is an array with a number for each image: 1 if the image is right after the attack, 0 if it is wrong, or the
share of right predictions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from purify_fast.evaluation.show.tables import markdown_table

from . import settings_of

#: The command that computes the numbers, in Markdown.
COMMAND = "`python -m benchmarks study diffusion`"
PGD = "PGD-200, EOT 20, exact"


def bits(text: Sequence[str]) -> np.ndarray:
    """Convert a text of 0 and 1 to an array of numbers."""
    return np.array([int(one) for one in text], dtype=float)


def rows_of(folder: Path) -> Sequence[dict[str, Any]]:
    """Return the rows of the study in a folder of results, or an empty list if there is no results file."""
    path = folder / "diffusion.json"
    return json.loads(path.read_text()) if path.is_file() else []


class Found:
    """The outcomes of a model under several attacks. An outcome is None if its job is not finished.

    Args:
        results: results of the jobs of the model.
    """

    def __init__(self, results: Sequence[dict[str, Any]]):
        self.groups = {result["group"]: result for result in results}

    def rule(self, rule: str, when: str = "attacked", group: str = "exact") -> np.ndarray | None:
        """Return an outcome of several random predictions of each image.

        Args:
            rule: "first" counts the first prediction, "mean" the share of right predictions, "all" whether all
                predictions are right, and "vote" whether the majority is right.
            when: "clean" or "attacked".
            group: group of attacks.
        """
        if group not in self.groups:
            return None
        of = self.groups[group][when]
        if rule == "vote":
            return bits(of["vote"])
        draws = np.stack([bits(one) for one in of["draws"]])
        return {"first": draws[0], "mean": draws.mean(0), "all": draws.min(0)}[rule]

    def chain(self) -> np.ndarray | None:
        """Return the outcome of the first images after PGD and then the protocol `strong`."""
        return bits(self.groups["strong"]["after"]) if "strong" in self.groups else None

    def authors(self) -> dict[str, np.ndarray]:
        """Return the outcomes of the authors' attacks, by the labels of the attacks."""
        rows = self.groups.get("authors", {"rows": []})["rows"]
        return {row["attack"]: bits(row["robust"]) for row in rows}

    def seconds(self) -> float | None:
        """Return the processor seconds of PGD for one image."""
        exact = self.groups.get("exact")
        return None if exact is None else exact["cpu_seconds"] / exact["images"]


def share(robust: np.ndarray | None) -> str:
    """Return the mean of an outcome with its standard error, in percent."""
    if robust is None:
        return "-"
    return f"{100 * robust.mean():.1f} ± {100 * robust.std() / len(robust) ** 0.5:.1f}"


def difference(robust: np.ndarray | None, other: np.ndarray | None) -> str:
    """Return the paired difference of two outcomes, with its standard error, in percentage points.

    The difference is taken on the images that both outcomes have.
    """
    if robust is None or other is None:
        return "-"
    few = min(len(robust), len(other))
    apart = robust[:few] - other[:few]
    return f"{100 * apart.mean():+.1f} ± {100 * apart.std() / few**0.5:.1f}"


def cells(found: Found, alone: Found, name: str) -> dict[str, str]:
    """Return the table's cells for a model, by the names of the lines.

    Args:
        found: outcomes of the model.
        alone: outcomes of the adversarially trained classifier without a purifier.
        name: name of this classifier.
    """
    lines = {"clean: mean of the draws": share(found.rule("mean", "clean"))}
    lines |= {label: f"{share(left)} ({len(left)})" for label, left in found.authors().items()}
    rules = {"first": "one draw", "mean": "mean of the draws", "all": "every draw right", "vote": "majority"}
    lines |= {f"{PGD}: {words}": share(found.rule(rule)) for rule, words in rules.items()}
    lines[f"{PGD}: mean, minus `{name}` alone"] = difference(found.rule("mean"), alone.rule("mean"))
    lines[f"{PGD}: one draw, fixed and known"] = share(found.rule("first", group="fixed"))
    chain = found.chain()
    after = "PGD-200, then `strong`"
    lines[f"{after}: every draw right"] = "-" if chain is None else f"{share(chain)} ({len(chain)})"
    lines[f"{after}: every draw right, minus `{name}` alone"] = difference(chain, alone.chain())
    seconds = found.seconds()
    lines["CPU seconds of PGD-200 per image"] = "-" if seconds is None else f"{seconds:.1f}"
    return lines


def tables_of(part: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the tables of a data set. The first compares models, and a second may compare diffusion processes.

    Args:
        part: part of settings.yaml for the data set.
        rows: results on the data set.
    """
    names = [*part["purifiers"], *part["classifiers"], *part["beside"]]
    found = {name: Found([row for row in rows if row["model"] == name and row["process"] is None]) for name in names}
    alone = part["alone"]
    columns = {name: cells(one, found[alone], alone) for name, one in found.items() if one.groups}
    lines = list(dict.fromkeys(line for told in columns.values() for line in told))
    # Put clean accuracy first, then the authors' attacks, and then the attacks with exact gradients.
    lines.sort(key=lambda line: 0 if line.startswith("clean") else 1 if line.startswith("as ") else 2)
    body = [[line, *(told.get(line, "-") for told in columns.values())] for line in lines]
    most = max(row["images"] for row in rows)
    head = {name: f"`{name}`" for name in columns}
    for row in rows:
        if row["images"] < most and row["model"] in head:
            head[row["model"]] = f"`{row['model']}`, {row['images']} images"
    tables = [markdown_table(["%", *head.values()], body)]
    others = [row for row in rows if row["process"] is not None]
    if others:
        tables.append(of_processes(others, found[part["processes_of"]]))
    return tables


def of_processes(results: Sequence[dict[str, Any]], own: Found) -> list[str]:
    """Return the table of a purifier with different diffusion processes.

    Args:
        results: results with other processes than the purifier's own process.
        own: outcomes with the purifier's own process.
    """
    told = {"the model's own": own}
    for result in results:
        told[in_words(result["process"])] = Found([result])
    body = []
    for words, one in told.items():
        seconds = one.seconds()
        columns = [share(one.rule("mean", "clean")), *(share(one.rule(rule)) for rule in ("mean", "all", "vote"))]
        body.append([words, *columns, "-" if seconds is None else f"{seconds:.1f}"])
    head = ["process", "clean", "mean of the draws", "every draw right", "majority", "CPU seconds per image"]
    return [f"`{results[0]['model']}` with other processes, under {PGD}:", "", *markdown_table(head, body)]


def in_words(process: dict[str, Any]) -> str:
    """Describe the settings in which a process differs from the purifier's own process."""
    return ", ".join(f"{name} {value}" for name, value in process.items() if value is not None)


def said(results: Path) -> list[str]:
    """Return a list item with sentences on the numbers of each purifier.

    Args:
        results: the folder ``benchmarks/results``.
    """
    rows, lines = rows_of(results / "studies"), []
    for dataset, part in settings_of("diffusion")["data_sets"].items():
        for name in part["purifiers"]:
            one = Found([row for row in rows if row["model"] == name and row["process"] is None])
            exact, weakest = one.rule("mean"), max(one.authors().values(), key=lambda left: left.mean(), default=None)
            if exact is None:
                continue
            text = f"- `{name}`: after PGD-200 through every step, {share(exact)} % of single predictions are right"
            if weakest is not None:
                shown = f"{share(weakest)} % of {len(weakest)} images"
                text += f". After the weakest attack of such purifiers' authors, {shown} are right"
            chain = one.chain()
            if chain is not None:
                text += f". After `strong`, {share(chain)} % of {len(chain)} images are right in every draw"
            lines.append(f"{text}.")
        kept = Found([row for row in rows if row["model"] == part["alone"]]).rule("mean")
        if kept is not None:
            lines.append(
                f"- `{part['alone']}`, the adversarially trained classifier without a purifier: after PGD-200, "
                f"{share(kept)} % of {len(kept)} images of {dataset} are right."
            )
    return lines or [f"Not run yet: {COMMAND} writes the numbers."]
