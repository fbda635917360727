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
from benchmarks.robustness.studies import RESULT, Job, cifar10
from benchmarks.robustness.studies.cifar10 import candidates, models, picture
from benchmarks.robustness.studies.cifar10 import study as names
from purify_fast.defences.stochastic import with_samples
from purify_fast.evaluation import Report
from purify_fast.evaluation.results.rows import Row
from purify_fast.methods.carso import Carso, CarsoConfig
from purify_fast.methods.carso.task import as_trained
from purify_fast.models import build_classifier
from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import Batch

pytestmark = pytest.mark.usefixtures("one_thread")
BUDGET = replace(names.budget_of("quick"), judging=names.Judging(clean=20, fast=4, strong=3, held_out=10), seeds=2)


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    """Names in them may cover each other."""
    monkeypatch.setattr(picture, "ROUNDS", 5)


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
        job = next(job for job in waiting if {*job.needed()} <= {*order})
        order.append((job.name, job.seed))
        waiting.remove(job)
    # the second seed takes what the first one's search chose
    again = next(job for job in jobs if (job.name, job.seed) == (names.ARREST_EMA, 1))
    assert (names.search_name(5.0, 30.0), 0) in again.needed()
    again = next(job for job in jobs if (job.name, job.seed) == (names.BEST, 1))
    assert {(names.tried_name(name), 0) for name in candidates.CANDIDATES} < set(again.needed())
    wanted = [*names.rows(BUDGET), names.BEST]
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


def test_lambda_and_phi_are_chosen_on_held_out_images_with_the_first_seed(tmp_path):
    training = SimpleNamespace(weights=(1.0, 5.0), angles=(10.0, 30.0))
    for pair, accuracy in {(1, 10): 0.3, (1, 30): 0.4, (5, 10): 0.5, (5, 30): 0.2}.items():
        fact(tmp_path, names.search_name(*pair), validation_accuracy=accuracy)
    for seed in (0, 1):
        job = Job(names.ARREST_EMA, seed, cifar10.judge, settings={"budget": training})
        assert models.chosen(job, tmp_path) == (5.0, 10.0)


def test_the_best_candidate_is_chosen_on_images_that_no_model_was_trained_on(tmp_path, monkeypatch):
    x = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1)
    whole = models.data.DataSet(x, torch.arange(100), x[:2], torch.arange(2), name="cifar10", num_classes=10)
    monkeypatch.setattr(models.data, "load_dataset", lambda *_: whole)
    settings = {"data": "x", "device": "cpu", "budget": BUDGET.training}
    job = Job(names.judged_name(names.BEST, "fast"), 0, cifar10.judge, settings=settings)
    assert models.images_of(job).y_train.tolist() == list(range(64))
    assert models.held_out(job, 10)[1].tolist() == list(range(64, 74))
    # references are tried as well, and are no candidates
    for name in (names.BASE, names.CARSO_PIPELINE):
        fact(tmp_path, names.tried_name(name), clean=0.9, tried={"share": 0.9})
    first, second = candidates.CANDIDATES
    # a number that cannot be believed does not count; of two that are equally robust, the more accurate one is taken
    for first_found in ({"share": 0.6, "reliable": False}, {"share": 0.5, "reliable": True}):
        fact(tmp_path, names.tried_name(first), clean=0.1, tried=first_found)
        fact(tmp_path, names.tried_name(second), clean=0.2, tried={"share": 0.5, "reliable": True})
        # with another seed the same one is trained
        assert models.best(job, tmp_path) == models.best(replace(job, seed=1), tmp_path) == second
    assert names.trained_as(second, 1) == names.BEST and names.trained_as(second, 0) == second


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
    task, batch = candidates.TradesTask(model, config, (3, 8, 8)), batch_of(8)
    loss, metrics = task.training_step(batch)
    divergence = divergence_of(model(batch.x).log_softmax(1), model(task.inputs(batch, [])[0]).log_softmax(1))
    expected = F.cross_entropy(model(batch.x), batch.y) + candidates.BETA * divergence
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert divergence > 0 and metrics["divergence"].item() == pytest.approx(divergence.item(), rel=1e-3)


@pytest.mark.parametrize("loss", ["trades", "distilled"])
def test_candidates_minimize_what_they_say(loss):
    """The loss again, from the defence's predictions of the batch and of its attacked form."""
    torch.manual_seed(0)
    base = build_classifier("small_cnn", (3, 16, 16), 10, width=4)
    sharpened([base.head.weight], 30)
    defence = Carso(base, ["conv2"], (3, 16, 16), 8, 4, 2, decoder_width=2)
    # a fresh purifier hardly looks at its image
    named = defence.named_parameters()
    sharpened([p for name, p in named if not name.startswith("classifier.") and p.dim() > 1], 10)
    config = CarsoConfig(attack_target="pipeline", attack=models.attack_of(BUDGET.training))
    if loss == "distilled":
        config = replace(config, targets="classifier", reconstruction_weight=0.0)
    task, batch = candidates.CandidateTask(defence, config, "scratch", loss), batch_of(16)
    # latents are drawn by seeds from torch's generator
    torch.manual_seed(1)
    minimized, metrics = task.training_step(batch)
    torch.manual_seed(1)
    defence = with_samples(defence, config.train_samples)
    with as_trained(defence, batch):
        moved = defence.sample_logits(config.attack.run(defence, batch))[:, 0].log_softmax(1)
        wanted = (defence.sample_logits(batch.x)[:, 0] if loss == "trades" else base(batch.x)).log_softmax(1)
    expected = divergence = divergence_of(wanted, moved)
    if loss == "trades":
        expected = F.nll_loss(wanted, batch.y) + candidates.BETA * divergence
    assert divergence > 1e-6 and minimized.item() == pytest.approx(expected.item(), rel=5e-3)
    assert metrics["divergence"].item() == pytest.approx(divergence.item(), rel=5e-3)


def row(model, attack, robust, kind):
    robust = np.array(robust, dtype=bool)
    settings = {"eot_iter": 1, "survivors_only": False, "target": "defence"}
    more = {"n_eval": 1, "seed": 0, "seconds": 1.0, "data": "x", "settings": settings, "attacked": len(robust)}
    return Row(model=model, attack=attack, kind=kind, variant="random", robust=robust, **more)


def judged(root, name, number, seed=0, row_name=None):
    """The files that judging a model leaves; its row may have another name."""
    robust = [1, 1, number % 2, 0]
    lowest = {"share": sum(robust) / 4, "images": 4, "reliable": name != names.CARSO}
    clean = 0.9 - number / 100
    rows = [row(name, "clean", [1, 1, 1, 1], "clean"), row(name, "APGD", robust, "apgd")]
    for protocol in BUDGET.judging.protocols(seed):
        last = robust if protocol == "fast" else [1, 0, 0]
        worst = replace(row(name, "worst", last, "worst"), reliable=name != names.CARSO)
        report = Report([*rows, worst], [], {"threat": "L-inf 8/255"})
        job = names.judged_name(row_name or name, protocol)
        folder = fact(root, job, seed, model=name, clean=clean, **{protocol: lowest})
        (folder / "report.json").write_text(report.to_json())


COSTS = {"parameters": 7e5, "inference_gflop": 0.07, "training_gflop": 1.5}


def trained(root, name, seed=0, **more):
    """Write the files of a training that has ended."""
    fact(root, name, seed, **COSTS, **more)


def test_the_table_is_what_the_jobs_found(tmp_path):
    root, results = tmp_path / "runs", tmp_path / "results" / "studies"
    for number, name in enumerate(names.rows(BUDGET)):
        trained(root, name, weight=5.0, angle=10.0)
        judged(root, name, number)
    best = next(iter(candidates.CANDIDATES))
    for name in names.COMPARED:
        trained(root, name, 1, weight=5.0, angle=10.0)
        judged(root, best if name == names.BEST else name, 1, seed=1, row_name=name)
    for name in names.TRIED:
        fact(root, names.tried_name(name), clean=0.7, tried={"share": 0.3, "reliable": name == names.BASE})
    trained(root, best)
    judged(root, best, 0, row_name=names.BEST)
    page = cifar10.write(root, results, BUDGET).read_text()
    assert "Trained with seed 1:" in page and page.count("- `CARSO pipeline` minus `PGD-AT`, under `fast`: ") == 2
    assert "| PGD-AT | 89.0 ± 7.0 | 75.0 ± 21.7 | 33.3 ± 27.2 |" in page
    assert "reference: no purifier | 70.0 ± 14.5 | 30.0 ± 26.5 |" in page
    assert "| 70.0 ± 14.5 | 30.0 ± 26.5 **unreliable** |" in page
    # pages quote single numbers; of two seeds the mean
    for key, number in {"clean": 89.0, "strong": 100 / 3}.items():
        assert fill.value("cifar10", names.BASE, key, tmp_path / "results") == f"{number:.1f}"
    assert (results / "cifar10" / "tradeoff.png").is_file()


def test_the_committed_table_is_that_of_the_committed_numbers(tmp_path):
    folder = RESULTS / "studies"
    lines = {(line["name"], line["seed"]): line for line in json.loads((folder / "cifar10.json").read_text())}
    reports = {}
    for seed, name in enumerate(("report.json", "report-1.json")):
        rows = Report.from_json((folder / "cifar10" / name).read_text()).rows
        for (row_name, of), line in lines.items():
            if of == seed and "model" in line:
                own = [row for row in rows if row.model == line["model"]]
                reports[row_name, seed] = Report(own, about={"threat": "L-inf 8/255"})
    page = cifar10.write_table(tmp_path, cifar10.Results(lines, reports), names.budget_of("default"))
    assert page.read_text() == (folder / "cifar10.md").read_text()
