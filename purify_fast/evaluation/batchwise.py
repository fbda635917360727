"""One attack on all of a row's images, batch by batch; what is finished is kept."""

from __future__ import annotations

import dataclasses
import time

import torch
from torch import Tensor

from ..attacks import Attack, AttackContext, GradientHealth
from ..protocols import Classifier
from .function_attack import check_adversarial
from .partial_row import Batch, PartialRow
from .subject import Subject

#: What `GradientHealth` counts.
COUNTS = ("gradients", "nonfinite", "zero", "images", "unmoved")


def attack_batchwise(
    attack: Attack, target: Classifier, index: Tensor, *, subject: Subject, context: AttackContext, kept: PartialRow
) -> tuple[Tensor, Batch]:
    """Attack some of the images.

    Random starts are tied to an image's index, so that of a model that predicts the same every time the batches do not
    matter. The random generators go on from batch to batch as if no batch had been made before.

    Args:
        attack: the attack.
        target: what it runs on.
        index: the images, int64.
        subject: brings them.
        context: what the evaluation tells the attack.
        kept: the batches that an interrupted run finished.

    Returns:
        All the images with what was found in the places of ``index``, and the sums over the batches.

    Raises:
        TypeError: the attack returned no tensor.
        ValueError: the attack returned what it was not allowed to return (`check_adversarial`).
    """
    adversarial = subject.x.clone()
    whole = Batch(adversarial[:0], dict.fromkeys(COUNTS, 0), [], 0.0)
    for part in index.split(context.batch_size):
        if len(part) == 0:
            continue
        batch = kept.read(part)
        if batch is None:
            batch = _attack(attack, target, part, subject, context)
            kept.keep(part, batch)
        else:
            _restore(batch.generators, subject.device)
        adversarial[part] = batch.found.to(adversarial.device)
        whole.seconds += batch.seconds
        for name, count in batch.health.items():
            whole.health[name] += count
        whole.warnings += [text for text in batch.warnings if text not in whole.warnings]
        for name, count in batch.fallen.items():
            whole.fallen[name] = whole.fallen.get(name, 0) + count
    return adversarial, whole


def _attack(attack: Attack, target: Classifier, part: Tensor, subject: Subject, context: AttackContext) -> Batch:
    begin = time.perf_counter()
    x, y, ids = (tensor.to(subject.device) for tensor in (subject.x[part], subject.y[part], part))

    def search() -> tuple[Tensor, AttackContext, GradientHealth]:
        health = GradientHealth()
        told = dataclasses.replace(context, sample_ids=ids, health=health, warnings=[], fell_to={})
        # the attack gets a copy, so that what it does to the images cannot hide how far it went
        return attack.search(target, x.clone(), y, told), told, health

    graphs = context.graphs
    found, told, health = search() if graphs is None else graphs.without_if_memory_ends(search, subject.device)
    check_adversarial(attack.name(context), found, x, attack.threat_model(context))
    counts = {name: health.count(name) for name in COUNTS}
    seconds = time.perf_counter() - begin
    states = _states(subject.device)
    return Batch(found.detach().cpu(), counts, states, seconds, warnings=told.warnings, fallen=told.fell_to)


def _states(device: torch.device) -> list[Tensor]:
    """The states of torch's random generators: the CPU's, and the GPU's where the model is on one."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _restore(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)
