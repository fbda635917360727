"""A class with the names and arguments of the original AutoAttack, see `purify_fast.judge.drop_in`."""

from .judge.drop_in import AutoAttack as AutoAttack
