"""Calls of the judge's attacks with all settings of a direct call: of the attack, and of its context."""

from dataclasses import fields

from purify_fast.attacks import APGD, FABT, AttackContext, Square, StAdv
from purify_fast.attacks.base import chosen_seed, untraced
from purify_fast.attacks.functions import goal


def function_of(kind, **usual):
    """The attack of a class as a function."""

    @untraced
    def call(model, x, y, eps=None, *, seed=None, loss=None, targeted=None, **options):
        chosen = usual.get("loss", "ce") if loss is None else loss
        y, own = goal(x, y, chosen, targeted)
        # A direct call has its ball in the context.
        names = {field.name for field in fields(kind)} - {"eps", "norm"}
        settings = usual | {name: options.pop(name) for name in [*options] if name in names}
        settings |= {"loss": "ce" if callable(chosen) else chosen} if "loss" in names else {}
        context = {"seed": chosen_seed(seed), "loss_function": own, "toward": targeted is not None, **options}
        settings |= {"eps": eps} if kind is StAdv and eps is not None else {}
        context |= {} if kind is StAdv else {"eps": eps}
        return kind(**settings).run(model, x, y, AttackContext(**context)).images

    return call


apgd = function_of(APGD, steps=100, eot_iter=1)
fab_t = function_of(FABT, eot_iter=1)
square = function_of(Square, eot_iter=1)
stadv = function_of(StAdv, steps=20, keep_best=False, eot_iter=1, loss="margin")
