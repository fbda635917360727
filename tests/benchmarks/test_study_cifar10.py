"""The study on CIFAR-10: its jobs fit together, what it chooses it chooses on held-out images, its table is right."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from benchmarks import RESULTS
from benchmarks import __main__ as program
from benchmarks.pages import fill
from benchmarks.robustness import studies
from benchmarks.robustness.studies import RESULT, Job, cifar10
from benchmarks.robustness.studies.cifar10 import candidates, job_list, models
from benchmarks.robustness.studies.cifar10 import results as results_of_study
from benchmarks.robustness.studies.cifar10 import study as names
from benchmarks.robustness.studies.cifar10.table import NothingJudged, write_tables
from purify_fast.evaluation import Report
from purify_fast.evaluation.rows import Row
from purify_fast.evaluation.show import tradeoff
from purify_fast.methods.carso import Carso, CarsoConfig
from purify_fast.methods.carso.task import as_trained
from purify_fast.models import build_classifier
from purify_fast.training import Batch

pytestmark = pytest.mark.usefixtures("one_thread")
BUDGET = replace(
    names.budget_of("quick"),
    judging=names.Judging(clean=20, fast=4, standard=2, strong=3, official=2, held_out=10, authors=4),
    seeds=2,
)


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    """Names in them may cover each other."""
    monkeypatch.setattr(tradeoff, "ROUNDS", 5)


def fact(root, name, seed=0, **facts):
    folder = studies.folder_of(root, name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).write_text(json.dumps(facts))
    return folder


def test_every_need_comes_before_what_needs_it_and_every_row_is_judged(tmp_path):
    jobs = cifar10.jobs("nowhere", BUDGET)
    studies._check(jobs, tmp_path)
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
    rows_of |= {(names.AUTHORS, 0): names.AS_AUTHORS, ("standard", 0): names.OFFICIAL, ("official", 0): names.OFFICIAL}
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
        job = Job(names.ARREST_EMA, seed, job_list.judge, settings={"budget": training})
        assert models.chosen(job, tmp_path) == (5.0, 10.0)


def test_the_best_candidate_is_chosen_on_images_that_no_model_was_trained_on(tmp_path, monkeypatch):
    x = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1)
    whole = models.data.DataSet(x, torch.arange(100), x[:2], torch.arange(2), name="cifar10", num_classes=10)
    monkeypatch.setattr(models.data, "load_dataset", lambda *_: whole)
    settings = {"data": "x", "device": "cpu", "budget": BUDGET.training}
    job = Job(names.judged_name(names.BEST, "fast"), 0, job_list.judge, settings=settings)
    assert models.images_of(job).y_train.tolist() == list(range(64))
    assert models.held_out(job, 10)[1].tolist() == list(range(64, 74))
    eligible = (candidates.MIXED, *candidates.CANDIDATES)
    # references are tried as well, and are no candidates
    for name in (names.BASE, names.CARSO_PIPELINE):
        fact(tmp_path, names.tried_name(name), clean=0.9, tried={"share": 0.9})
    for number, name in enumerate(eligible):
        # The first one seems the most robust, but its number cannot be believed. If two are equally robust, the
        # more accurate one is taken.
        share = {0: 0.6, 1: 0.5, 3: 0.5}.get(number, 0.4)
        fact(tmp_path, names.tried_name(name), clean=number / 10, tried={"share": share, "reliable": number > 0})
    assert models.best(job, tmp_path) == eligible[3]
    # with another seed the same one is trained
    assert models.best(replace(job, seed=1), tmp_path) == eligible[3]
    assert names.trained_as(eligible[3], 1) == names.BEST and names.trained_as(eligible[3], 0) == eligible[3]


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
    with as_trained(defence, batch, config):
        moved = defence.sample_logits(config.attack.run(defence, batch))[:, 0].log_softmax(1)
        wanted = (defence.sample_logits(batch.x)[:, 0] if loss == "trades" else base(batch.x)).log_softmax(1)
    expected = divergence = divergence_of(wanted, moved)
    if loss == "trades":
        expected = F.nll_loss(wanted, batch.y) + candidates.BETA * divergence
    assert divergence > 1e-6 and minimized.item() == pytest.approx(expected.item(), rel=5e-3)
    assert metrics["divergence"].item() == pytest.approx(divergence.item(), rel=5e-3)


@pytest.mark.parametrize("robust, winner", [((1.0, 1.0, 0.0), 0), ((0.0, 9.0, 0.0), 1)])
def test_the_mixture_is_decided_by_the_accurate_model_where_the_robust_one_is_unsure(robust, winner):
    mixed = candidates.Mixed(torch.nn.Flatten(), torch.nn.Flatten())
    mixed.accurate.forward = lambda x: torch.tensor([[5.0, 0.0, 0.0]])
    mixed.robust.forward = lambda x: torch.tensor([robust])
    logits = mixed(torch.zeros(1, 3, 2, 2))
    assert logits.exp().sum().item() == pytest.approx(1.0, rel=1e-5)
    assert logits.argmax().item() == winner


def row(model, attack, robust, kind):
    robust = np.array(robust, dtype=bool)
    share = float(robust.mean())
    settings = {"eot_iter": 1, "survivors_only": False, "target": "defence"}
    return Row(
        model=model,
        attack=attack,
        kind=kind,
        variant="random",
        robust=robust,
        mean=share,
        worst=share,
        n_eval=1,
        seed=0,
        seconds=1.0,
        data="x",
        settings=settings,
        attacked=len(robust),
    )


def judged(root, name, number, seed=0, row_name=None):
    """The files that judging a model leaves; its row may have another name."""
    robust = [1, 1, number % 2, 0]
    lowest = {"share": sum(robust) / 4, "images": 4, "reliable": name != names.PEEL}
    protocols = ["fast"] if seed > 0 else list(BUDGET.judging.protocols())
    if name in names.AS_AUTHORS:
        protocols = [names.AUTHORS]
    clean = 0.9 - number / 100
    rows = [row(name, "clean", [1, 1, 1, 1], "clean"), row(name, "APGD", robust, "apgd")]
    for protocol in protocols:
        count = BUDGET.judging.protocols().get(protocol, 4)
        last = robust if protocol in ("fast", names.AUTHORS) else [1, 0, 0, 0][:count]
        worst = replace(row(name, "worst", last, "worst"), reliable=name != names.PEEL)
        report = Report([*rows, worst], [], {"threat": "L-inf 8/255"})
        job = names.judged_name(row_name or name, protocol)
        folder = fact(root, job, seed, model=name, clean=clean, **{protocol: lowest})
        (folder / "report.json").write_text(report.to_json())


COSTS = {"parameters": 7e5, "inference_gflop": 0.07, "training_gflop": 1.5}


def trained(root, name, seed=0, **more):
    """What a training of 90 minutes leaves: its first epoch was twice as fast as its second."""
    folder = fact(root, name, seed, **COSTS, **more)
    batch = BUDGET.training.batch_size
    epochs = [{"step": 1800, "images_per_second": batch}, {"step": 3600, "images_per_second": batch / 2}]
    (folder / "log.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs))


def finished(root, name, number, seed=0, **more):
    """What training and judging a model leave."""
    trained(root, name, seed, **more)
    judged(root, name, number, seed)


def test_the_table_is_what_the_jobs_found(tmp_path):
    root, results = tmp_path / "runs", tmp_path / "results" / "studies"
    for number, name in enumerate([*names.rows(BUDGET), *names.AS_AUTHORS]):
        finished(root, name, number, weight=5.0, angle=10.0)
    for name in names.COMPARED:
        trained(root, name, 1, weight=5.0, angle=10.0)
        judged(root, candidates.MIXED if name == names.BEST else name, 1, seed=1, row_name=name)
    official = {"share": 0.25, "images": 4, "reliable": True}
    fact(root, names.judged_name(names.BASE, "official"), official=official)
    fact(root, names.tried_name(candidates.MIXED), clean=0.7, tried={"share": 0.3, "reliable": False})
    trained(root, candidates.MIXED)
    judged(root, candidates.MIXED, 0, row_name=names.BEST)
    page = cifar10.write(root, results, BUDGET).read_text()
    # on the same images: the attack of the authors, ours, its classifier's, and the difference
    places = {name: number for number, name in enumerate([*names.rows(BUDGET), *names.AS_AUTHORS])}
    shares = [50 + 25 * (places[name] % 2) for name in (names.PEEL, names.CARSO, names.BASE)]
    whole = f"| {shares[0]:.1f} **unreliable** | {shares[1]:.1f} | {shares[2]:.1f} | {shares[1] - shares[0]:+.1f} ±"
    assert f"| {names.PEEL} {whole}" in page
    assert "Trained with seed 1:" in page and page.count("- CARSO pipeline minus PGD-AT, `fast`: ") == 2
    # the second image of all, and the third of every other one, withstood the first protocol alone
    count = len(names.rows(BUDGET)) + 1
    changes = "-1 in the row `standard`; -2 in the row `PGD-AT`;"
    assert re.search(rf"In 0 of {count} rows, `strong` and `fast` .*: {changes}", page)
    assert "reference: no purifier" not in page and "Not judged yet" not in page
    # pages quote single numbers; of two seeds the mean
    quoted = {(names.PEEL, "authors"): shares[0], (names.BASE, "clean"): 89.0, (names.BASE, "official"): 25.0}
    for (name, key), number in quoted.items():
        assert fill.value("cifar10", name, key, tmp_path / "results") == f"{number:.1f}"
    assert (results / "cifar10" / "tradeoff.png").is_file()


@pytest.mark.parametrize("name", ["cifar10", "cifar10_given"])
def test_the_committed_tables_are_those_of_the_committed_numbers(name, tmp_path):
    budget, results = names.budget_of("default"), {}
    for stem in ("cifar10", "cifar10_given"):
        results[stem] = results_of_study.Results.read(RESULTS / "studies", budget, stem)
    given = {row for row, _ in results["cifar10_given"].lines}
    page = write_tables(tmp_path, name, results[name], budget, given=given, base="cifar10-pgd-at-w16")
    assert page.read_text() == (RESULTS / "studies" / page.name).read_text()


def test_the_table_of_an_unfinished_study_has_the_rows_that_are_there(tmp_path):
    with pytest.raises(NothingJudged, match=re.escape(str(tmp_path))):
        cifar10.write(tmp_path, tmp_path / "results", BUDGET)
    with pytest.raises(NothingJudged):
        program.main(["study", "cifar10", "--so-far", "--out", str(tmp_path)])
    finished(tmp_path, names.BASE, 1)
    judged(tmp_path, names.NO_EMA, 2)
    page = cifar10.write(tmp_path, tmp_path / "results", BUDGET).read_text()
    # the same training of 90 minutes left both
    assert names.BASE in page and page.count("| 1.50 | 1.50 |") == 2
    assert "Not judged yet, seed 0: standard; PGD-AT, longer; " in page


def test_a_study_done_in_parts_has_one_table(tmp_path):
    """What a folder of runs lacks is taken from the results; what it has replaces them; other budgets never mix."""
    one, other, results = tmp_path / "one", tmp_path / "other", tmp_path / "results"
    finished(one, names.BASE, 1)
    finished(one, names.STANDARD, 2)
    finished(one, names.ARREST_EMA, 2, seed=1, weight=5.0, angle=10.0)
    fact(one, names.tried_name(names.BASE), clean=0.7, tried={"share": 0.3, "reliable": True})
    cifar10.write(one, results, BUDGET)
    finished(other, names.AWP, 2)
    finished(other, names.STANDARD, 5)
    finished(other, names.BASE, 1, seed=1)
    page = cifar10.write(other, results, BUDGET).read_text()
    assert "- PGD-AT, AWP minus PGD-AT, `fast`: -25.0 ± " in page
    assert "- ARREST, moving average minus PGD-AT, `fast`: -25.0 ± " in page.split("Trained with seed 1:")[1]
    assert "| PGD-AT | 89.0 ± 7.0 | 75.0 ± 21.7 |" in page and "| standard | 85.0 ± 8.0 | 75.0 ± 21.7 |" in page
    assert "reference: no purifier | 70.0 ± 14.5 | 30.0 ± 26.5 |" in page
    # the same once more: nothing changes
    assert cifar10.write(other, results, BUDGET).read_text() == page
    # neither a folder without any result nor another budget changes what is there
    with pytest.raises(NothingJudged, match="empty"):
        cifar10.write(tmp_path / "empty", results, BUDGET)
    longer = replace(BUDGET, training=SimpleNamespace(**vars(BUDGET.training) | {"base_epochs": 2}))
    with pytest.raises(results_of_study.OtherBudget, match=re.escape(str(results))):
        cifar10.write(other, results, longer)
    job = next(job for job in cifar10.jobs("nowhere", longer) if job.name == names.BASE)
    (studies.folder_of(other, names.BASE, 1) / studies.ASKED).write_text(json.dumps(job.asked()))
    for place in (results, tmp_path / "nothing there yet"):
        with pytest.raises(results_of_study.OtherBudget, match=r"PGD-AT-1\b.*--width"):
            cifar10.write(other, place, BUDGET)
    assert (results / "cifar10.md").read_text() == page and not (tmp_path / "nothing there yet").exists()


def test_a_model_that_was_trained_anew_is_named(tmp_path, capsys):
    """The user must remove the results that began with the old model."""
    one, other, results = tmp_path / "one", tmp_path / "other", tmp_path / "results"
    for number, name in enumerate((names.BASE, names.NO_EMA, names.CARSO)):
        finished(one, name, number)
    cifar10.write(one, results, BUDGET)
    finished(other, names.BASE, 1)
    cifar10.write(other, results, BUDGET)
    assert "trained again" not in capsys.readouterr().err
    log = studies.folder_of(other, names.BASE, 0) / "log.jsonl"
    log.write_text(log.read_text().splitlines()[0] + "\n")
    assert "| CARSO, paper's objective |" in cifar10.write(other, results, BUDGET).read_text()
    assert capsys.readouterr().err == "PGD-AT, seed 0: trained again; remove results that began with it\n"
