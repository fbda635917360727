"""`purify_fast.evaluation.evaluate` without a progress bar."""

import inspect
from dataclasses import replace

from purify_fast import evaluation
from purify_fast.evaluation import EvaluateConfig

KEYWORDS = inspect.signature(evaluation.evaluate).parameters.keys()


def evaluate(model, x, y, **options):
    """The report of an evaluation without a progress bar; options that are no keywords are fields of the config."""
    given = {"progress": False} | options
    rare = {name: given.pop(name) for name in given.keys() - KEYWORDS}
    if rare:
        given["config"] = replace(given.get("config") or EvaluateConfig(), **rare)
    return evaluation.evaluate(model, x, y, **given)
