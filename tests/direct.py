"""Direct calls of attacks with the settings of a context, which the functions have no keywords for."""

from dataclasses import fields

from search_calls import apgd, fab_t, square, stadv

from purify_fast.attacks import APGD, FABT, FGSM, PGD, JudgeContext, Square, StAdv, fgsm, pgd

#: For each function: its class, and the defaults in which it differs from its class.
CLASSES = {
    pgd: (PGD, {"steps": 40, "keep_best": False}),
    fgsm: (FGSM, {}),
    apgd: (APGD, {"precision": "float32"}),
    fab_t: (FABT, {"precision": "float32"}),
    square: (Square, {"precision": "float32"}),
    stadv: (StAdv, {"steps": 20, "keep_best": False}),
}


def direct(attack, model, x, y, health=None, **options):
    """Attack a batch by a function or a class, with fields of the class and of `JudgeContext` as options.

    The counts of the attack are added to ``health``.
    """
    kind, usual = CLASSES.get(attack, (attack, {}))
    own = {each.name for each in fields(kind)} - ({"eps", "norm"} if kind.norms else set())
    options = usual | options
    made = kind(**{name: options.pop(name) for name in own & options.keys()})
    result = made.run(model, x, y, JudgeContext(**options, counts_health=health is not None))
    if health is not None:
        health.add(**result.health.counts)
    return result.images
