"""The study on CIFAR-10: its jobs fit together, what it chooses it chooses on held-out images, its table is right."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from benchmarks import RESULTS
from benchmarks.pages import fill
from benchmarks.robustness import studies
from benchmarks.robustness.studies import RESULT, cifar10
from benchmarks.robustness.studies.cifar10 import models
from benchmarks.robustness.studies.cifar10 import study as names
from purify_fast.defences.stochastic import with_samples
from purify_fast.evaluation import Report
from purify_fast.judge.results.rows import Row
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.methods.carso.task import as_trained
from purify_fast.models import build_classifier
from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import Batch

BUDGET = replace(names.budget_of("quick"), judging=names.Judging(clean=20, fast=4, strong=3), seeds=2)


def fact(root, name, seed=0, **facts):
    folder = studies.folder_of(root, name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).write_text(json.dumps(facts))
    return folder


def test_every_need_comes_before_what_needs_it_and_every_row_is_judged():
    jobs = cifar10.jobs("nowhere", BUDGET)
    # the order of a single worker: the first job whose needs are finished comes next
    order, waiting = list[tuple[str, int]](), list(jobs)
    while waiting:
        job = next(job for job in waiting if {(need, job.seed) for need in job.needs} <= {*order})
        order.append((job.name, job.seed))
        waiting.remove(job)
    wanted = names.rows(BUDGET)
    rows_of = {("fast", 0): wanted, ("fast", 1): names.COMPARED, ("strong", 0): wanted}
    for (protocol, seed), rows in rows_of.items():
        assert all((names.judged_name(row, protocol), seed) in order for row in rows)
    # everything stands on the base, and a model is judged before the next is trained
    assert [name for name, _ in order[:2]] == [names.BASE, names.judged_name(names.BASE, "fast")]
    trained = [place for place, (name, _) in enumerate(order) if name == names.CARSO]
    assert all(order[place + 1][0] == names.judged_name(names.CARSO, "fast") for place in trained)


def test_a_training_stays_the_same_job_when_more_images_are_judged():
    more = replace(BUDGET, judging=names.Judging(standard=7))
    asked = [
        {(job.name, job.seed): job.asked() for job in listed if "judging" not in job.settings}
        for listed in (cifar10.jobs("x", BUDGET), cifar10.jobs("y", more, "cuda"))
    ]
    assert asked[0] == asked[1]


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
    with as_trained(defence, batch):
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


def row(model, attack, robust, kind):
    robust = np.array(robust, dtype=bool)
    settings = {"eot_iter": 1, "survivors_only": False, "target": "defence"}
    more = {"n_eval": 1, "seed": 0, "seconds": 1.0, "data": "x", "settings": settings, "attacked": len(robust)}
    return Row(model=model, attack=attack, kind=kind, robust=robust, **more)


def judged(root, name, number, seed=0):
    """The files that judging a model leaves."""
    robust = [1, 1, number % 2, 0]
    clean = 0.9 - number / 100
    rows = [row(name, "clean", [1, 1, 1, 1], "clean"), row(name, "APGD", robust, "apgd")]
    for protocol in BUDGET.judging.protocols(seed):
        last = robust if protocol == "fast" else [1, 0, 0]
        worst = replace(row(name, "worst", last, "worst"), reliable=name != names.CARSO)
        report = Report([*rows, worst], [], {"threat": "L-inf 8/255"})
        folder = fact(root, names.judged_name(name, protocol), seed, clean=clean)
        (folder / "report.json").write_text(report.to_json())


COSTS = {"parameters": 7e5, "inference_gflop": 0.07, "training_gflop": 1.5}


def test_the_table_is_what_the_jobs_found(tmp_path):
    root, results = tmp_path / "runs", tmp_path / "results" / "studies"
    for number, name in enumerate(names.rows(BUDGET)):
        fact(root, name, **COSTS)
        judged(root, name, number)
    for name in names.COMPARED:
        fact(root, name, 1, **COSTS)
        judged(root, name, 1, seed=1)
    page = cifar10.write(root, results, BUDGET).read_text()
    assert "Trained with seed 1:" in page and page.count("- `CARSO pipeline` minus `PGD-AT`, under `fast`: ") == 2
    assert "| PGD-AT | 89.0 ± 7.0 | 75.0 ± 21.7 | 33.3 ± 27.2 |" in page
    # pages quote single numbers; of two seeds the mean
    for key, number in {"clean": 89.0, "strong": 100 / 3}.items():
        assert fill.value("cifar10", names.BASE, key, tmp_path / "results") == f"{number:.1f}"


def test_the_committed_table_is_that_of_the_committed_numbers(tmp_path):
    folder = RESULTS / "studies"
    lines = {(line["name"], line["seed"]): line for line in json.loads((folder / "cifar10.json").read_text())}
    reports = {}
    for seed, name in enumerate(("report.json", "report-1.json")):
        rows = Report.from_json((folder / "cifar10" / name).read_text()).rows
        for row_name, of in lines:
            if of == seed:
                own = [row for row in rows if row.model == row_name]
                reports[row_name, seed] = Report(own, about={"threat": "L-inf 8/255"})
    page = cifar10.write_table(tmp_path, cifar10.Results(lines, reports), names.budget_of("default"))
    assert page.read_text() == (folder / "cifar10.md").read_text()
