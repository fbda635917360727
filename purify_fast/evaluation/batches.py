"""One attack on all of a row's images, batch by batch."""

from __future__ import annotations

import dataclasses
import time

import torch
from torch import Tensor

from ..attacks import Attack, GradientHealth, Run
from ..protocols import Classifier
from .keep.cache import Batch, PartialRow
from .specs import check_adversarial
from .subject import Subject

#: What `GradientHealth` counts.
COUNTS = ("gradients", "nonfinite", "zero", "images", "unmoved")


def attack_in_batches(
    attack: Attack,
    target: Classifier,
    index: Tensor,
    *,
    subject: Subject,
    context: Run,
    unfinished: PartialRow,
) -> tuple[Tensor, Batch]:
    """Attack some of the images.

    Random starts are tied to an image's index, so that of a model that predicts the same every time the batches do not
    matter. The random generators go on from batch to batch, also where an earlier run made some of them.

    Args:
        attack: the attack.
        target: what it runs on.
        index: the images, int64.
        subject: brings them.
        context: what the evaluation tells the attack.
        unfinished: keeps the batches, and has those that an interrupted run finished.

    Returns:
        All the images, attacked in the places of ``index``, and the sums over the batches.

    Raises:
        TypeError: the attack returned no tensor.
        ValueError: the attack returned what it was not allowed to return (`check_adversarial`).
    """
    adversarial = subject.x.clone()
    sums = Batch(adversarial[:0], dict.fromkeys(COUNTS, 0), [], 0.0)
    begun = 0
    for part in index.split(context.batch_size):
        if len(part) == 0:
            continue
        begun += len(part)
        batch = unfinished.read(part)
        if batch is None:
            if context.graphs is not None:
                context.graphs.to_come = (len(index) - begun) / len(part)
            batch = _attack(attack, target, part, subject, context)
            unfinished.keep(part, batch)
        else:
            torch.set_rng_state(batch.generators[0])
            for state in batch.generators[1:]:
                torch.cuda.set_rng_state(state, subject.device)
        adversarial[part] = batch.images.to(adversarial.device)
        sums.seconds += batch.seconds
        for name, count in batch.health.items():
            sums.health[name] += count
        sums.warnings += [text for text in batch.warnings if text not in sums.warnings]
        for name, count in batch.fallen.items():
            sums.fallen[name] = sums.fallen.get(name, 0) + count
    return adversarial, sums


def _attack(attack: Attack, target: Classifier, part: Tensor, subject: Subject, context: Run) -> Batch:
    begin = time.perf_counter()
    x, y, ids = (tensor.to(subject.device) for tensor in (subject.x[part], subject.y[part], part))

    def search() -> tuple[Tensor, Run, GradientHealth]:
        health = GradientHealth()
        told = dataclasses.replace(context, sample_ids=ids, health=health, warnings=[], fell_to={})
        # the attack gets a copy, so that what it does to the images cannot hide how far it went
        return attack.search(target, x.clone(), y, told), told, health

    graphs, device = context.graphs, subject.device
    images, told, health = search() if graphs is None else graphs.without_if_memory_ends(search, device)
    check_adversarial(attack.name(context), images, x, attack.threat_model(context))
    counts = {name: health.count(name) for name in COUNTS}
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
    seconds = time.perf_counter() - begin
    return Batch(images.detach().cpu(), counts, states, seconds, warnings=told.warnings, fallen=told.fell_to)
