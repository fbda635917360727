"""Run ``python -m benchmarks truth``: count the adversarial examples that AutoAttack and the protocols miss.

A subject is a network or a group of networks, and a contestant is AutoAttack or a protocol. The results file has two
kinds of rows. The row of a subject's truth says for each image whether its ball contains an adversarial example. The
truth is computed once, because it does not depend on attacks. The row of a contestant on a subject says which images
the contestant did not break. This row is computed again if the networks or the attacks have changed.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path

import torch

from purify_fast._files import write_text
from purify_fast.attacks.ball import ball_around, projected
from purify_fast.attacks.relu_layers import affine_layers
from purify_fast.evaluation import EvaluateConfig, evaluate

from ... import options
from ...speed import timing
from ...speed.running import Budget
from .. import revisions
from ..counted_model import CountedModel
from . import exact
from .exact_networks import NETWORKS
from .subjects import CONSTRUCTED, HIDDEN, QUICK, SUBJECTS, Part, Setting, hidden, identity, parts_of
from .truth_tables import CONTESTANTS, FALLS, FALLS_IN_FLOAT64, FILE, ROBUST, UNDECIDED, WRONG, Row, key, markdown, read

#: The number of images in a batch, which is the default of AutoAttack.
BATCH = 250
LETTERS = {exact.ROBUST: ROBUST, exact.FALLS: FALLS, exact.UNDECIDED: UNDECIDED}


def decided(part: Part, seconds: float) -> Row:
    """Decide the images of a network. Return, for each image, a letter for the verdict and a letter for the last step.

    Args:
        part: network and its images.
        seconds: approximate time limit for an image, in seconds.
    """
    layers = affine_layers(part.model, part.x.shape[1:])
    verdicts, how = "", ""
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
    return {"verdicts": [verdicts], "how": [how]}


def write(out: Path, kind: str, row: Row) -> None:
    """Write a row into the results file. If the file has a row with the same key, the new row replaces it.

    Args:
        out: folder of the results.
        kind: "truth" or "contestants".
        row: the new row.
    """
    # Read the file here, because another process may have written rows into it.
    results = read(out)
    others = [one for one in results[kind] if key(one) != key(row)]
    results[kind] = sorted([*others, row | timing.environment(torch.device("cpu"))], key=key)
    write_text(out / FILE, json.dumps(results, indent=1) + "\n")


def find(setting: Setting, name: str) -> None:
    """Compute the truth about a subject. Do nothing if the truth about its networks is already known.

    Args:
        setting: folders and amounts.
        name: name of the subject in `SUBJECTS`.
    """
    parts, begin = parts_of(setting, name), time.process_time()
    row = {"subject": name, "networks": identity(parts), "eps": parts[0].eps}
    if any(row.items() <= known.items() for known in read(setting.out)["truth"]):
        return
    if name in NETWORKS:
        row |= decided(parts[0], setting.seconds)
    elif name == CONSTRUCTED:
        row |= {"verdicts": [ROBUST * len(part.y) for part in parts]}
    else:
        first = list(HIDDEN).index(name) * len(parts)
        row |= {"verdicts": hidden(setting).verdicts()[first : first + len(parts)]}
    write(setting.out, "truth", row | {"cpu_seconds": time.process_time() - begin})


def attack(setting: Setting, name: str, who: str, seed: int) -> None:
    """Let a contestant attack the networks of a subject. Networks with a result of the same attacks are skipped.

    Args:
        setting: folders and amounts.
        name: name of the subject in `SUBJECTS`.
        who: name of the contestant in `CONTESTANTS`.
        seed: seed of the evaluation.
    """
    parts, protocol = parts_of(setting, name), CONTESTANTS[who][0]
    code = {"networks": identity(parts), "attacks": revisions.of_protocol(protocol, random=False)}
    row = {"subject": name, "contestant": who, "seed": seed, "code": code, "left": []}
    row |= {"forwards": 0, "gradients": 0, "cpu_seconds": 0.0}
    for known in read(setting.out)["contestants"]:
        if key(known) == key(row) and known["code"] == code:
            row = known
    config = EvaluateConfig(protocol=protocol, seed=seed, batch_size=BATCH)
    for part in parts[len(row["left"]) :]:
        door, begin = CountedModel(part.model), time.process_time()
        report = evaluate(door, part.x, part.y, eps=part.eps, config=config, progress=False)
        row["cpu_seconds"] += time.process_time() - begin
        row["left"].append("".join("01"[bool(image)] for image in report.headline.robust))
        row["forwards"] += door.counts.forwards
        row["gradients"] += door.counts.gradients
        write(setting.out, "contestants", row)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m benchmarks truth``."""
    options.add_names(parser, SUBJECTS, what="attacked networks")
    attacks = "attacks that are tested; without a name only the truth is computed"
    options.add_names(parser, CONTESTANTS, "--contestants", attacks)
    parser.add_argument("--data", type=Path, help="folder with mnist.npz, or with the official files")
    options.add_out(parser, "/cpu")


def main(chosen: argparse.Namespace) -> str:
    """Compute the rows that are missing or outdated, and return the tables."""
    out = options.out_of(chosen, chosen.quick, "cpu")
    setting, names = Setting(out, chosen.data, **(QUICK if chosen.quick else {})), []
    for name in chosen.names:
        try:
            parts_of(setting, name)
            names.append(name)
        except (ValueError, FileNotFoundError) as error:
            print(f"{name} is left out: {error}", flush=True)
    work = [(name, partial(find, setting, name)) for name in names]
    for who in chosen.contestants:
        for name in names:
            # Use one seed for a group of many networks.
            for seed in range(CONTESTANTS[who][1] if name in NETWORKS else 1):
                work.append((f"{name}, {who}, seed {seed}", partial(attack, setting, name, who, seed)))
    Budget().go(work, "row")
    return "\n".join(markdown(read(out)))
