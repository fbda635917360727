"""The study on CIFAR-10: its jobs fit together, what it chooses it chooses on held-out images, its table is right."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from benchmarks import RESULTS
from benchmarks.robustness.merged import read_rows
from benchmarks.robustness.studies import cifar10
from benchmarks.robustness.studies.cifar10 import models, study as names
from purify_fast.defences.stochastic import with_samples
from purify_fast.evaluation import Report
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.methods.purifier_task import noise_of
from purify_fast.models import build_classifier
from purify_fast.models.classifiers import SmallCNN
from purify_fast.models.representation import evaluation_mode
from purify_fast.training import Batch

BUDGET = replace(names.budget_of("quick"), judging=names.Judging(clean=20, fast=4, strong=3), seeds=2)


def test_the_cost_of_a_training_step_is_counted_where_the_images_are():
    """Without data, tensors have a device of their own too, and operators take no tensors of two devices."""

    def counted(device):
        model = SmallCNN(width=4).to(device)
        images = torch.zeros(20, 1, 16, 16, dtype=torch.uint8, device=device)
        labels = torch.zeros(20, dtype=torch.int64, device=device)

        def updates(batch):
            losses = F.cross_entropy(model(batch.x), batch.y, reduction="none")
            yield SimpleNamespace(loss=(losses * batch.sample_ids).sum())

        task = SimpleNamespace(updates=updates)
        return models.training_flops(task, SimpleNamespace(x_train=images, y_train=labels))

    assert counted("meta") == counted("cpu") > 0


def divergence_of(wanted, moved):
    """KL(wanted || moved) of log-probabilities, mean over images."""
    return (wanted.exp() * (wanted - moved)).sum(1).mean()


def batch_of(size):
    return Batch(torch.rand(4, 3, size, size), torch.arange(4), torch.arange(4), seed=0, epoch=0, epochs=1)


def sharpened(parameters, factor):
    """Predictions that an attack moves by more than rounding."""
    with torch.no_grad():
        for weight in parameters:
            weight.mul_(factor)


def test_trades_is_its_formula():
    torch.manual_seed(0)
    model = build_classifier("small_cnn", (3, 8, 8), 10, width=2)
    sharpened([model.head.weight, model.hidden.weight], 10)
    config = replace(models.adversarial(BUDGET.training), ema_decay=0.0, precision="float32")
    task, batch = models.TradesTask(model, config, (3, 8, 8)), batch_of(8)
    loss, metrics = task.training_step(batch)
    divergence = divergence_of(model(batch.x).log_softmax(1), model(task.inputs(batch, [])[0]).log_softmax(1))
    expected = F.cross_entropy(model(batch.x), batch.y) + models.BETA * divergence
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert divergence > 0 and metrics["divergence"].item() == pytest.approx(divergence.item(), rel=1e-3)


def test_a_distilled_purifier_learns_the_probabilities_of_the_base():
    """The loss again, from the base's predictions of the batch and the defence's of its attacked form."""
    torch.manual_seed(0)
    base = build_classifier("small_cnn", (3, 16, 16), 10, width=4)
    sharpened([base.head.weight], 30)
    defence = Carso(base, ["conv2"], (3, 16, 16), 8, 4, 2, decoder_width=2)
    # a fresh purifier hardly looks at its image
    named = defence.named_parameters()
    sharpened([p for name, p in named if not name.startswith("classifier.") and p.dim() > 1], 10)
    attack = models.attack_of(BUDGET.training)
    config = CarsoConfig(attack_target="pipeline", attack=attack, targets="classifier", reconstruction_weight=0.0)
    batch = batch_of(16)
    # latents are drawn by seeds from torch's generator
    torch.manual_seed(1)
    minimized, metrics = CarsoTask(defence, config).training_step(batch)
    torch.manual_seed(1)
    defence = with_samples(defence, config.train_samples)
    with evaluation_mode(defence), noise_of(defence, batch):
        moved = defence.sample_logits(attack.run(defence, batch))[:, 0].log_softmax(1)
        divergence = divergence_of(base(batch.x).log_softmax(1), moved)
    assert divergence > 1e-6 and minimized.item() == pytest.approx(divergence.item(), rel=5e-3)
    assert metrics["divergence"].item() == pytest.approx(divergence.item(), rel=5e-3)


@pytest.mark.parametrize(
    ("clean", "robust", "total", "nrr"),
    [(90.24, 50.20, "140.4", "64.5"), (73.05, 24.32, "97.4", "36.5"), (0, 0, "0.0", "0.0"), (95, 0, "95.0", "0.0")],
)
def test_sum_and_nrr(clean, robust, total, nrr):
    """The first two as ARREST published them: its specification's fact 11."""
    assert cifar10.tradeoff(clean / 100, robust / 100) == f"{total} | {nrr}"


def test_the_committed_table_is_that_of_the_committed_numbers(tmp_path):
    folder = RESULTS / "studies"
    lines = {(line["name"], line["seed"]): line for line in json.loads((folder / "cifar10.json").read_text())}
    reports = {}
    for seed, name in enumerate(("report.json", "report-1.json")):
        rows = read_rows(folder / "cifar10" / name)
        for row_name, of in lines:
            if of == seed:
                own = [row for row in rows if row.model == row_name]
                reports[row_name, seed] = Report(own, about={"threat": "L-inf 8/255"})
    page = cifar10.write_table(tmp_path, cifar10.Results(lines, reports), names.budget_of("default"))
    assert page.read_text() == (folder / "cifar10.md").read_text()
