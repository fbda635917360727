"""A report as the JSON that RobustBench's model pages are made of."""

from __future__ import annotations

import json

from .report import Report


def robustbench_json(
    report: Report,
    *,
    name: str,
    paper: str = "",
    authors: str = "",
    venue: str = "",
    architecture: str = "",
    dataset: str | None = None,
    additional_data: bool = False,
) -> str:
    """The report of one model in RobustBench's form, accuracies in percent as texts with two digits.

    RobustBench's ``autoattack_acc`` is filled where the report has a row of AutoAttack itself on all images; otherwise
    the lowest number stands as ``external``, as RobustBench has it for evaluations other than its own.

    Args:
        report: of one model.
        name: of the defence, as a title.
        paper: its address.
        authors: their names.
        venue: where it was published.
        architecture: of the network.
        dataset: None takes the report's.
        additional_data: whether more than the data set was trained on.

    Raises:
        ValueError: the report has several models, or no attack.
    """
    lowest = report.headline
    clean = next(row for row in report.rows if row.kind == "clean")
    auto = [row for row in report.rows if row.kind == "autoattack" and row.n == clean.n and row.threat is None]
    norm, _, eps = report.about.get("threat", "").rpartition(" ")
    number = f"{100 * lowest.accuracy:.2f}"
    content = {
        "link": paper,
        "name": name,
        "authors": authors,
        "venue": venue,
        "architecture": architecture,
        "dataset": dataset if dataset is not None else report.about.get("dataset", ""),
        "threat_model": {"L-inf": "Linf"}.get(norm, norm),
        "eps": eps,
        "additional_data": additional_data,
        "number_forward_passes": "1",
        "clean_acc": f"{100 * clean.accuracy:.2f}",
        "reported": number,
        "autoattack_acc": f"{100 * auto[0].accuracy:.2f}" if auto else "",
        "external": number,
        "unreliable": not lowest.reliable,
        "number_of_images": lowest.n,
        "evaluated_with": report.about.get("version", ""),
    }
    return json.dumps(content, indent=1)
