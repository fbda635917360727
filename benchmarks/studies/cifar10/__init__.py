"""CIFAR-10 at L-inf 8/255: the three methods, by the papers' objectives and through the pipeline, beside networks.

`models` trains, `plan` lists the jobs and judges by this package's own engine, `results` and `table` put all of it into
one table.
"""

from .plan import clean_accuracy, jobs
from .study import DEFAULT, FULL, QUICK, Budget
from .table import write, write_given

__all__ = ["DEFAULT", "FULL", "QUICK", "Budget", "clean_accuracy", "jobs", "write", "write_given"]
