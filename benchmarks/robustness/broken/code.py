"""The code on which a result depends: that of the model, and the attacks and signs of the judge."""

from __future__ import annotations

import functools
import inspect
import types
from pathlib import Path
from typing import Any

import torch

from purify_fast import zoo
from purify_fast._tensors import text_hash, weights_fingerprint
from purify_fast.attacks import AutoAttack
from purify_fast.evaluation import AttackSpec
from purify_fast.evaluation.alarms import signs
from purify_fast.evaluation.softening import REVISION as SOFTENING

from ... import kept
from .. import revisions
from . import active, adaptive, pintor
from .broken_tables import ACTIVE, ADAPTIVE, ENTRIES, FILE, OFFICIAL, PINTOR
from .entry import Entry

#: Increase this number whenever a change here gives other figures for the same attacks; kept results with an older
#: number are then made again.
REVISION = 1


def code(name: str, judge: str) -> dict[str, str]:
    """Short hashes of the code that makes a result.

    Args:
        name: name of the model.
        judge: name of the judge.
    """
    entry = ENTRIES[name]
    return {"model": _of_model(name), "judge": _short("\n".join([f"{REVISION}", *_of_judge(entry, judge)]))}


def _short(text: str) -> str:
    return text_hash(text).hexdigest()[:12]


def _of_judge(entry: Entry, judge: str) -> list[str]:
    if judge == PINTOR:
        return [f"indicators {pintor.REVISION}"]
    if judge == ACTIVE:
        return [f"active test {active.REVISION}"]
    if judge == OFFICIAL:
        spec = AttackSpec(AutoAttack(version="rand" if entry.random else "standard"))
        return revisions.of_attacks([(spec, spec.resolved)])
    if judge == ADAPTIVE:
        specs = adaptive.specs(entry, [None] * 10)
        follows = [str(part.follows) for part in adaptive.chain(entry)]
        return [*revisions.of_attacks([(spec, spec.resolved) for spec in specs]), *follows]
    # The protocols also attack surrogates if they find signs of masked gradients, so the revision of surrogates and the
    # limits of the signs count.
    return [*revisions.of_protocol(judge, entry.random), f"surrogates {SOFTENING}", *_of_signs()]


def _of_signs() -> list[str]:
    """The signs and their limits."""
    values = {name: value for name, value in vars(signs).items() if name.isupper()}
    limits = [f"{name} {value}" for name, value in values.items() if isinstance(value, int | float)]
    return [*(alarm.name for alarm in signs.ALARMS), *sorted(limits)]


@functools.cache
def _of_model(name: str) -> str:
    """A hash of a model: the sources that build it, all that they call in this package, and the zoo's weights in it."""
    entry = ENTRIES[name]
    found: dict[int, str] = {}
    _collect(entry.build, found)
    text = "\n".join(sorted(set(found.values())))
    words = set(text.replace("'", '"').split('"'))
    weights = [f"{each} {_weights(each)}" for each in zoo.list() if each in words]
    return _short("\n".join([text, *weights, f"{entry.data} {entry.eps} {entry.random}"]))


@functools.cache
def _weights(name: str) -> str:
    with torch.random.fork_rng([]):
        return weights_fingerprint(zoo.load(name))


def _collect(thing: Any, found: dict[int, str]) -> None:
    """Add the sources of a function or a class of this package and of everything that it refers to, by identity."""
    if id(thing) in found:
        return
    if isinstance(thing, functools.partial):
        referred = [thing.func, *thing.args, *thing.keywords.values()]
        found[id(thing)] = ""
    elif isinstance(thing, tuple | list):
        referred = list(thing)
        found[id(thing)] = ""
    elif isinstance(thing, type | types.FunctionType) and thing.__module__.startswith(str(__package__)):
        source = inspect.getsource(thing)
        # Leave the decorator of an entry out: it holds the words of the table and the attack, which do not change the
        # model.
        found[id(thing)] = source[max(source.find("def "), 0) :] if source.startswith("@entry") else source
        functions = [thing] if isinstance(thing, types.FunctionType) else vars(thing).values()
        referred = [one for each in functions if isinstance(each, types.FunctionType) for one in _referred(each)]
    else:
        if isinstance(thing, str | int | float):
            found[id(thing)] = repr(thing)
        return
    for one in referred:
        _collect(one, found)


def _referred(function: types.FunctionType) -> list[Any]:
    """The objects that a function refers to: variables around it, defaults, and names of its module."""
    names, codes = set[str](), [function.__code__]
    while codes:
        now = codes.pop()
        names |= {*now.co_names}
        codes += [each for each in now.co_consts if isinstance(each, types.CodeType)]
    around = [cell.cell_contents for cell in function.__closure__ or ()]
    given = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    spaces = [function.__globals__]
    spaces += [vars(each) for each in map(function.__globals__.get, names) if isinstance(each, types.ModuleType)]
    return [*around, *given, *(space[name] for space in spaces for name in sorted(names & space.keys()))]


def outdated(results: Path) -> list[str]:
    """A line for each result that other code made than there is now.

    Args:
        results: the folder ``benchmarks/results``.
    """
    return [
        kept.outdated(FILE, f"{one['judge']} of {one['model']!r}", "broken")
        for one in kept.rows_of(results / FILE)
        if one["model"] not in ENTRIES or one["code"] != code(one["model"], one["judge"])
    ]
