"""Compute short hashes of the code on which a result depends.

Each result is saved with its hashes. If a hash has changed, the result is outdated. A result belongs to a model and a
judge. A judge is a method that evaluates models, such as a protocol. A result depends on the code of the model, on the
attacks of the judge, and on the signs by which a report is called unreliable.
"""

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

#: Increase this number if a change in this folder changes results for the same attacks. Saved results with an older
#: number are then computed again.
REVISION = 1


def code(name: str, judge: str) -> dict[str, str]:
    """Return short hashes of the code that makes a result.

    Args:
        name: name of the model in `ENTRIES`.
        judge: name of the judge in `broken_tables.JUDGES`.
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
        return revisions.of_attacks([spec])
    if judge == ADAPTIVE:
        specs = adaptive.specs(entry, [None] * 10)
        follows = [str(part.follows) for part in adaptive.chain(entry)]
        return [*revisions.of_attacks(specs), *follows]
    # If a protocol finds signs of masked gradients, the protocol also attacks surrogates of the model. So include the
    # revision of the surrogates and the limits of the signs.
    return [*revisions.of_protocol(judge, entry.random), f"surrogates {SOFTENING}", *_of_signs()]


def _of_signs() -> list[str]:
    """Return the names of the signs, and their limits."""
    values = {name: value for name, value in vars(signs).items() if name.isupper()}
    limits = [f"{name} {value}" for name, value in values.items() if isinstance(value, int | float)]
    return [*(alarm.name for alarm in signs.ALARMS), *sorted(limits)]


@functools.cache
def _of_model(name: str) -> str:
    """Return a hash of a model.

    The hash covers the source of the function that builds the model, all code of this folder that the function uses,
    and the weights of models of the zoo that are named in this code.
    """
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
    """Collect the source of a function or class, and of all code in this folder that it uses, directly or indirectly.

    Args:
        thing: function, class, constant, or a tuple, list or partial of these.
        found: the sources so far, by the identity of the object. New sources are added.
    """
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
        # Leave out the decorator `entry`. The decorator has texts of the table, and the attack, which are not part of
        # the model.
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
    """Return the objects that a function refers to: closure variables, defaults, and names of its module."""
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
    """Return a message for each result whose code has changed since it was computed.

    Args:
        results: the folder ``benchmarks/results``.
    """
    return [
        kept.outdated(FILE, f"{one['judge']} of {one['model']!r}", "broken")
        for one in kept.rows_of(results / FILE)
        if one["model"] not in ENTRIES or one["code"] != code(one["model"], one["judge"])
    ]
