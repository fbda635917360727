"""The study on CIFAR-10: its jobs fit together, what it chooses it chooses on held-out images, its table is right."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from purify_fast.evaluation import Report
from purify_fast.evaluation.rows import Row
from purify_fast.methods.carso import Carso, CarsoConfig
from purify_fast.methods.carso.losses import as_trained, attack_pipeline
from purify_fast.models import build_classifier
from purify_fast.training import Batch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the installed package

from benchmarks import studies  # noqa: E402
from benchmarks.studies import RESULT, Job, cifar10, cifar10_ahead, cifar10_models, trades  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
BUDGET = cifar10_models.QUICK


def fact(root, name, **facts):
    folder = Job(name, 0, cifar10.judge).folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).write_text(json.dumps(facts))
    return folder


def test_every_need_has_its_job_and_every_row_is_judged(tmp_path):
    jobs = cifar10.jobs("nowhere", budget=BUDGET)
    studies._check(jobs, tmp_path)
    names = [job.name for job in jobs]
    assert all(cifar10.judged_name(row) in names for row in cifar10.rows())
    # the base comes first: everything stands on it
    assert names[0] == cifar10_models.BASE


def test_lambda_and_phi_are_chosen_on_held_out_images(tmp_path):
    budget = cifar10_models.Budget(weights=(1.0, 5.0), angles=(10.0, 30.0))
    job = Job(cifar10_models.ARREST, 0, cifar10.judge, settings={"budget": budget})
    for pair, accuracy in {(1, 10): 0.3, (1, 30): 0.4, (5, 10): 0.5, (5, 30): 0.2}.items():
        fact(tmp_path, cifar10_models.search_name(*pair), validation_accuracy=accuracy)
    assert cifar10_models.chosen(job, tmp_path) == (5.0, 10.0)


def test_trades_is_its_formula():
    torch.manual_seed(0)
    model = build_classifier("small_cnn", (3, 8, 8), 10, width=2)
    with torch.no_grad():
        # logits that an attack moves by more than rounding
        model.head.weight.mul_(10)
        model.hidden.weight.mul_(10)
    config = cifar10_models.adversarial(BUDGET, ema=False)
    task = trades.TradesTask(model, cifar10_models.replace(config, precision="float32"), (3, 8, 8))
    x, y = torch.rand(4, 3, 8, 8), torch.arange(4)
    batch = Batch(x, y, torch.arange(4), seed=0)
    loss, metrics = task.training_step(batch)
    attacked, _ = task.inputs(batch, [])
    clean, moved = model(x).softmax(1), model(attacked).softmax(1)
    divergence = (clean * (clean.log() - moved.log())).sum(1).mean()
    expected = F.cross_entropy(model(x), y) + trades.BETA * divergence
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert divergence > 0 and metrics["divergence"].item() == pytest.approx(divergence.item(), rel=1e-3)


@pytest.mark.parametrize("loss", ["trades", "distilled"])
def test_candidates_minimize_what_they_say(loss):
    """The loss again, from the defence's predictions of the batch and of its attacked form."""
    torch.manual_seed(0)
    base = build_classifier("small_cnn", (3, 16, 16), 10, width=4)
    with torch.no_grad():
        base.head.weight.mul_(30)
    defence = Carso(base, ["conv2"], (3, 16, 16), 8, 4, 2, decoder_width=2)
    with torch.no_grad():
        # a fresh purifier hardly looks at its image
        for weight in (
            p for name, p in defence.named_parameters() if not name.startswith("classifier.") and p.dim() > 1
        ):
            weight.mul_(10)
    config = CarsoConfig(attack_target="pipeline", attack=cifar10_models.attack_of(BUDGET))
    task = cifar10_ahead.CandidateTask(defence, config, "scratch", loss)
    batch = Batch(torch.rand(4, 3, 16, 16), torch.arange(4), torch.arange(4), seed=0, epoch=0, epochs=1)
    # latents are drawn by seeds from torch's generator
    torch.manual_seed(1)
    found, metrics = task.training_step(batch)
    torch.manual_seed(1)
    with as_trained(defence, batch, config):
        moved = defence.sample_logits(attack_pipeline(defence, batch, config))[:, 0].log_softmax(1)
        wanted = (defence.sample_logits(batch.x)[:, 0] if loss == "trades" else base(batch.x)).log_softmax(1)
    divergence = (wanted.exp() * (wanted - moved)).sum(1).mean()
    expected = divergence
    if loss == "trades":
        expected = F.nll_loss(wanted, batch.y) + trades.BETA * divergence
    assert divergence > 1e-6 and found.item() == pytest.approx(expected.item(), rel=5e-3)
    assert metrics["divergence"].item() == pytest.approx(divergence.item(), rel=5e-3)
    found.backward()
    trained = [p for p in defence.parameters() if p.requires_grad]
    assert trained and all(torch.isfinite(p.grad).all() for p in trained if p.grad is not None)


def test_the_mixture_is_decided_by_the_accurate_model_where_the_robust_one_is_unsure():
    fixed = lambda *logits: lambda x: torch.tensor([logits])  # noqa: E731
    unsure, sure = (1.0, 1.0, 0.0), (0.0, 9.0, 0.0)
    accurate = (5.0, 0.0, 0.0)
    for robust, winner in ((unsure, 0), (sure, 1)):
        mixed = cifar10_ahead.Mixed(torch.nn.Identity(), torch.nn.Identity())
        mixed.accurate, mixed.robust = torch.nn.Module(), torch.nn.Module()
        mixed.accurate.forward, mixed.robust.forward = fixed(*accurate), fixed(*robust)
        logits = mixed(torch.zeros(1, 3, 2, 2))
        assert logits.exp().sum().item() == pytest.approx(1.0, rel=1e-5)
        assert logits.argmax().item() == winner


def row(model, attack, robust, kind):
    robust = np.array(robust, dtype=bool)
    share = float(robust.mean())
    settings = {"attacked": len(robust), "eot_iter": 1, "survivors_only": False, "target": "defence"}
    return Row(model=model, attack=attack, kind=kind, variant="random", robust=robust, mean=share, worst=share,
               n_eval=1, seed=0, seconds=1.0, data="x", settings=settings)  # fmt: skip


def test_the_table_is_what_the_jobs_found(tmp_path):
    root, results = tmp_path / "runs", tmp_path / "results"
    for number, name in enumerate(cifar10.rows()):
        costs = {"parameters": 7e5, "inference_gflop": 0.07, "training_gflop": 1.5, "minutes": 90.0}
        fact(root, name, **costs, weight=5.0, angle=10.0)
        robust = [1, 1, number % 2, 0]
        judged = {"share": sum(robust) / 4, "images": 4, "reliable": name != cifar10_models.PEEL}
        more = {} if name == cifar10_models.PEEL else {"strong": {**judged, "share": 0.25}}
        folder = fact(root, cifar10.judged_name(name), clean=0.9 - number / 100, standard=judged, **more)
        rows = [row(name, "clean", [1, 1, 1, 1], "clean"), row(name, "APGD", robust, "apgd")]
        report = Report([*rows, row(name, "worst", robust, "worst")], [], {"threat": "L-inf 8/255"})
        (folder / "standard").mkdir()
        (folder / "standard" / "report.json").write_text(report.to_json())
    page = cifar10.write(root, results, budget=BUDGET).read_text()
    lines = {line.split(" | ")[0].strip("| "): line for line in page.splitlines() if line.startswith("| ")}
    assert "| 90.0 | 50.0 ± 25.0 | 25.0 (4) | 140.0 | 64.3 | 0.70 | 0.070 | 1.50 | 1.50 |" in lines["standard"]
    assert "**unreliable**" in lines[cifar10_models.PEEL] and "| - |" in lines[cifar10_models.PEEL]
    assert "lambda 5 and phi 10" in page
    assert "- CARSO pipeline minus PGD-AT, `standard`: " in page
    assert (results / "cifar10" / "tradeoff.png").is_file()
