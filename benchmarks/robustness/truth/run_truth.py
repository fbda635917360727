"""``python -m benchmarks truth``: how far AutoAttack and this package's protocols are from the truth.

The truth of each subject is one row of the results file: image by image, whether anything in the ball fools the
network. It does not depend on who attacks, and is found once. Every contestant's row holds what stood, network by
network; it is made again where the networks or the code of the protocol have changed since. Both are written as soon
as they are there: the command can be interrupted at any time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from purify_fast._files import write_text
from purify_fast.attacks.ball import ball_around, projected
from purify_fast.attacks.relu_layers import affine_layers
from purify_fast.evaluation import EvaluateConfig, evaluate

from ... import RESULTS, options
from ...speed import timing
from ...speed.running import Budget
from .. import revisions
from ..counted_model import CountedModel
from . import exact
from .exact_networks import NETWORKS
from .subjects import CONSTRUCTED, HIDDEN, QUICK, SUBJECTS, Amount, Part, Setting, hidden, identity, parts_of
from .truth_tables import CONTESTANTS, FALLS, FALLS_IN_FLOAT64, FILE, ROBUST, UNDECIDED, WRONG, Row, key, markdown, read

#: Images that are attacked together, as AutoAttack's own default is.
BATCH = 250
LETTERS = {exact.ROBUST: ROBUST, exact.FALLS: FALLS, exact.UNDECIDED: UNDECIDED}


def decided(part: Part, seconds: float) -> Row:
    """The truth of one network's images: a letter for each, and how it was decided.

    Args:
        part: the network.
        seconds: of the program, about.
    """
    layers = affine_layers(part.model, part.x.shape[1:])
    verdicts, how, spent = "", "", []
    for x, y, predicted in zip(part.x, part.y.tolist(), part.model(part.x).argmax(1).tolist(), strict=True):
        if predicted != y:
            verdicts, how = verdicts + WRONG, how + "-"
            continue
        decision = exact.decide(layers, x, y, part.eps, seconds)
        letter = LETTERS[decision.verdict]
        if decision.point is not None:
            point = projected(x[None], decision.point.float().view_as(x)[None], ball_around(x[None], part.eps))
            letter = FALLS_IN_FLOAT64 if int(part.model(point).argmax()) == y else letter
        verdicts, how = verdicts + letter, how + decision.how[0]
        spent.append(decision.seconds)
    return {
        "verdicts": [verdicts],
        "how": [how],
        "median_seconds": statistics.median(spent or [0.0]),
        "longest_seconds": max(spent, default=0.0),
    }


def truth(setting: Setting, name: str) -> Row:
    """The row of the truth of one subject.

    Args:
        setting: where everything lies.
        name: one of `SUBJECTS`.
    """
    parts, begin = parts_of(setting, name), time.process_time()
    if name in NETWORKS:
        found = decided(parts[0], setting.amount.seconds)
    elif name == CONSTRUCTED:
        found = {"verdicts": [ROBUST * len(part.y) for part in parts]}
    else:
        first, whole = list(HIDDEN).index(name) * len(parts), hidden(setting)
        found = {"verdicts": whole.verdicts()[first : first + len(parts)]}
    row = {"subject": name, "networks": identity(parts), "eps": parts[0].eps, **found}
    return row | {"cpu_seconds": time.process_time() - begin} | timing.environment(torch.device("cpu"))


def code(parts: Sequence[Part], who: str) -> Row:
    """What a contestant's row depends on: the networks and images, and the attacks with their revisions."""
    return {"networks": identity(parts), "attacks": revisions.of_protocol(CONTESTANTS[who][0], random=False)}


def contest(parts: Sequence[Part], who: str, seed: int, known: Row | None = None) -> Iterator[Row]:
    """The row of one contestant, again after every network.

    Args:
        parts: the networks.
        who: one of `CONTESTANTS`.
        seed: of the evaluation.
        known: the row as it was left; it goes on where its ``code`` is still the same.
    """
    now = code(parts, who)
    row = {"contestant": who, "seed": seed, "code": now, "left": [], "forwards": 0, "gradients": 0, "cpu_seconds": 0.0}
    if known is not None and known["code"] == now:
        row |= known
    for part in parts[len(row["left"]) :]:
        door, begin = CountedModel(part.model), time.process_time()
        config = EvaluateConfig(protocol=CONTESTANTS[who][0], seed=seed, batch_size=BATCH)
        report = evaluate(door, part.x, part.y, eps=part.eps, config=config, progress=False)
        row["cpu_seconds"] += time.process_time() - begin
        row["left"].append("".join("01"[bool(image)] for image in report.headline.robust))
        row["forwards"] += door.counts.forwards
        row["gradients"] += door.counts.gradients
        yield row | timing.environment(torch.device("cpu"))


def write(out: Path, kind: str, row: Row) -> None:
    """Put one row in the place of the one that it replaces, into the file as it is now.

    Args:
        out: the folder.
        kind: "truth" or "contestants".
        row: it.
    """
    # read again: another process may have written other rows meanwhile
    results = read(out)
    others = [one for one in results[kind] if key(one) != key(row)]
    results[kind] = sorted([*others, row], key=key)
    write_text(out / FILE, json.dumps(results, indent=1) + "\n")


def find(setting: Setting, name: str) -> None:
    """Find the truth of a subject, where it is not known or its networks are others by now."""
    known = [row for row in read(setting.out)["truth"] if row["subject"] == name]
    if not known or known[0]["networks"] != identity(parts_of(setting, name)):
        write(setting.out, "truth", truth(setting, name))


def attack(setting: Setting, name: str, who: str, seed: int) -> None:
    """Let a contestant attack a subject, where its row is not whole or was made by other code."""
    wanted = {"subject": name, "contestant": who, "seed": seed}
    known = [row for row in read(setting.out)["contestants"] if key(row) == key(wanted)]
    for row in contest(parts_of(setting, name), who, seed, known[0] if known else None):
        write(setting.out, "contestants", wanted | row)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks truth``."""
    options.add_names(parser, SUBJECTS)
    options.add_names(parser, CONTESTANTS, "--contestants", "who attacks, where nobody only finds the truth")
    parser.add_argument("--data", type=Path, help="folder with mnist.npz, or the official files")
    options.add_minutes(parser)
    options.add_out(parser, "/cpu")


def main(chosen: argparse.Namespace) -> str:
    """Find the truth, and let the contestants attack, as far as that is not done; the tables."""
    out = chosen.out or (Path("runs/benchmarks") if chosen.quick else RESULTS) / "cpu"
    setting, names = Setting(out, chosen.data, QUICK if chosen.quick else Amount()), []
    for name in chosen.names:
        try:
            parts_of(setting, name)
            names.append(name)
        except (ValueError, FileNotFoundError) as error:
            print(f"{name} is left out: {error}", flush=True)
    work = [(name, partial(find, setting, name)) for name in names]
    for who in chosen.contestants:
        for name in names:
            # networks that hide something are many: one seed tells enough
            for seed in range(CONTESTANTS[who][1] if name in NETWORKS else 1):
                work.append((f"{name}, {who}, seed {seed}", partial(attack, setting, name, who, seed)))
    Budget(60 * chosen.minutes).go(work, "row")
    return "\n".join(markdown(read(out)))
