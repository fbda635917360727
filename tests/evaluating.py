"""`purify_fast.evaluation.evaluate` with its settings as keywords, which tests pass on one by one."""

from dataclasses import fields

from purify_fast import evaluation
from purify_fast.evaluation import EvaluateConfig

SETTINGS = {field.name for field in fields(EvaluateConfig)}


def evaluate(model, x, y, **options):
    """The report of an evaluation without a progress bar; the options are settings and arguments of `evaluate`."""
    given = {name: options.pop(name) for name in SETTINGS & options.keys()}
    return evaluation.evaluate(model, x, y, **{"progress": False} | options, config=EvaluateConfig(**given))
