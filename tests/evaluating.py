"""`purify_fast.evaluation.evaluate` without a progress bar."""

from purify_fast import evaluation


def evaluate(model, x, y, **options):
    """The report of an evaluation without a progress bar; the options are arguments and settings of `evaluate`."""
    return evaluation.evaluate(model, x, y, **{"progress": False} | options)
