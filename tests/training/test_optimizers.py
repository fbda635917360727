"""Optimizers: Lookahead and its exact resumption, one kernel for all weights, and convolutions that are raced."""

import copy
import json
from functools import partial

import pytest
import small_runs
import torch
from cuda_launches import CudaLaunches
from small_runs import (
    SHAPE,
    StopAt,
    Stopped,
    arrest_task,
    atop_task,
    attack,
    batch,
    carso_task,
    classifier_task,
    on_step,
)
from torch import nn

from purify_fast.methods.atop import Atop, AtopConfig, AtopTask, SmallGenerator
from purify_fast.methods.carso.task import carso_published
from purify_fast.models import build_classifier
from purify_fast.speed.precision import raced_convolutions
from purify_fast.training import FitConfig, Lookahead, fit
from purify_fast.training.optimizers import fuse, load_state
from purify_fast.training.sources import InMemory
from purify_fast.training.task import RunLength, one_cycle


def problem(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(6, 3), torch.randn(32, 6), torch.randn(32, 3)


def radam(model, lr=0.05):
    return torch.optim.RAdam(model.parameters(), lr=lr, foreach=True)


def steps(optimizer, model, x, y, count):
    for _ in range(count):
        optimizer.zero_grad()
        (model(x) - y).square().sum().backward()
        optimizer.step()


def test_fact_13_after_the_sixth_step_the_weights_are_mixed():
    fast, x, y = problem()
    model, *_ = problem()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer, alone = Lookahead(radam(model)), radam(fast)
    for step in range(1, 6):
        steps(optimizer, model, x, y, 1)
        steps(alone, fast, x, y, 1)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), fast.parameters(), strict=True)), step
    steps(optimizer, model, x, y, 1)
    steps(alone, fast, x, y, 1)
    for mixed, ahead, begin in zip(model.parameters(), fast.parameters(), start, strict=True):
        torch.testing.assert_close(mixed, 0.8 * ahead + 0.2 * begin)
        assert not torch.equal(mixed, ahead)


def test_a_slow_step_on_cuda_is_two_launches_whatever_the_number_of_weights():
    optimizer = Lookahead(torch.optim.SGD([nn.Parameter(torch.randn(n, 3)) for n in range(1, 21)], lr=0.0), k=1)
    with CudaLaunches() as counted:
        optimizer.step()
    assert counted.by_name == {"_foreach_lerp_": 1, "_foreach_copy_": 1}


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_without_a_fused_kernel_is_not_changed(fused):
    optimizer = torch.optim.Adadelta(problem()[0].parameters())
    before = copy.deepcopy(optimizer.state_dict())
    fuse(optimizer, fused)
    assert optimizer.state_dict() == before


@pytest.mark.parametrize("wrong", [{"k": 0}, {"alpha": 0.0}, {"alpha": 1.5}])
def test_bad_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} = {next(iter(wrong.values()))}"):
        Lookahead(radam(nn.Linear(1, 1)), **wrong)


OPTIMIZERS = {
    "AdamW": lambda weights: torch.optim.AdamW(weights, lr=0.01, foreach=True),
    "Adam": lambda weights: torch.optim.Adam(weights, lr=0.01, foreach=True),
    "SGD": lambda weights: torch.optim.SGD(weights, lr=0.01, momentum=0.9, foreach=True),
    "Lookahead": lambda weights: Lookahead(torch.optim.Adam(weights, lr=0.01, foreach=True), k=2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fused_optimizer_computes_the_same_and_resumes_either_way(name):
    """Also from the contiguous tensors of a checkpoint, where the weights lie in channels_last."""

    def started():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(16, 3, 3), nn.Flatten()).to(memory_format=torch.channels_last)
        return OPTIMIZERS[name](model.parameters()), model, torch.rand(4, 16, 4, 4) / 10, torch.randn(4, 12)

    plain, fused = started(), started()
    fuse(fused[0], True)
    assert fused[0].param_groups[0]["fused"] and not fused[0].param_groups[0]["foreach"]
    steps(*plain, 3)
    steps(*fused, 3)
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(plain[1].state_dict(), fused[1].state_dict(), **close)
    for source, then in ((fused, False), (plain, True)):
        resumed = started()
        resumed[1].load_state_dict(source[1].state_dict())
        state = copy.deepcopy(source[0].state_dict())
        for own in state.get("inner", state)["state"].values():
            own |= {key: value.contiguous() for key, value in own.items() if isinstance(value, torch.Tensor)}
        load_state(resumed[0], state)
        fuse(resumed[0], then)
        group = resumed[0].param_groups[0]
        assert (group["fused"], group["foreach"]) == ((True, False) if then else (None, True)) or name == "SGD"
        other = copy.deepcopy(source)
        steps(*resumed, 2)
        steps(*other, 2)
        torch.testing.assert_close(resumed[1].state_dict(), other[1].state_dict(), **close)


def test_convolutions_are_raced_only_where_it_is_asked_for(monkeypatch):
    cudnn, gpu = torch.backends.cudnn, torch.device("cuda")
    for deterministic, mode, device, raced in (
        (False, "auto", gpu, True),
        (False, "off", gpu, False),
        (False, "on", torch.device("cpu"), False),
        (True, "auto", gpu, False),
        (True, "on", gpu, True),
    ):
        monkeypatch.setattr(cudnn, "deterministic", deterministic)
        with raced_convolutions(mode, device):
            assert cudnn.benchmark == raced
        assert not cudnn.benchmark


# -- learning rates against those read off the official code -----------------------------------------------------------


def test_the_published_rate_ends_near_its_floor_and_serves_short_runs():
    assert carso_published(10**6 - 1, 10**6, 1.0) == pytest.approx(1.25e-4, rel=0.02)
    for epochs in (1, 2, 3, 7, 8, 9):
        assert all(0 < carso_published(epoch, epochs, 1.0) <= 1 for epoch in range(epochs))


def test_one_cycle():
    assert [one_cycle(at, 1.0) for at in (0, 0.2, 1.0)] == pytest.approx([1 / 25, 1.0, 1e-3])
    rates = [one_cycle(i / 100, 1.0) for i in range(101)]
    assert max(rates) <= 1 and rates.index(max(rates)) == 20


# -- delayed terms of a loss: refused where they never act, told in the log, and epochs of other lengths ---------------


def images(count=12):
    torch.manual_seed(0)
    return (255 * torch.rand(count, 3, 8, 8)).to(torch.uint8), torch.arange(count) % 10


def atop(**settings):
    torch.manual_seed(0)
    defence = Atop(build_classifier("small_cnn", (3, 8, 8), 10, width=2), SmallGenerator(3, width=4), (3, 8, 8))
    return AtopTask(defence, AtopConfig(**settings))


IDLE_TERMS = [
    # 3 steps an epoch of 4 images
    ({"cls_delay": 2, "cls_delay_unit": "epochs"}, 2, "cls_delay is too long: .* begin in step 7"),
    ({"cls_delay": 6, "cls_delay_unit": "steps"}, 2, "would begin in step 7 of 6"),
    ({"cls_delay": 21, "cls_delay_unit": "images"}, 2, "would begin in step 7 of 6"),
    ({}, 1, "cls_delay is too long"),
]


@pytest.mark.parametrize(("settings", "epochs", "message"), IDLE_TERMS)
def test_a_term_that_never_acts_is_refused_before_the_run(settings, epochs, message, tmp_path):
    x, y = images()
    with pytest.raises(ValueError, match=message):
        fit(atop(**settings), x, y, FitConfig(epochs, 4), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    # a delay that is one shorter leaves the last step
    shorter = {"cls_delay": 5, "cls_delay_unit": "steps"}
    assert "cross_entropy" in fit(atop(**shorter), x, y, FitConfig(2, 4), progress=False)
    assert "cross_entropy" not in fit(atop(cls_weight=0.0), x, y, FitConfig(1, 4), progress=False)


@pytest.mark.parametrize(("settings", "epochs"), [({}, 2), ({"kl_delay": 0.75}, 4)])
def test_a_kl_term_that_never_acts_is_refused(settings, epochs):
    with pytest.raises(ValueError, match="kl_delay is too long"):
        carso_task(**settings).terms(RunLength(epochs, 2, 8, 16))


def test_the_log_says_from_which_step_on_a_term_acts(tmp_path):
    x, y = images()
    fit(atop(cls_delay=9, cls_delay_unit="images"), x, y, FitConfig(2, 4), tmp_path, progress=False)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    # 8 images are behind step 2, 12 behind step 3: the term acts in the second epoch alone
    assert all(row["acts_from_step"] == {"cross_entropy": 3} for row in rows)
    assert ["cross_entropy" in row for row in rows] == [False, True]


def test_a_metric_is_the_mean_over_the_steps_that_measure_it_also_after_a_resume(tmp_path):
    """The term acts from the second of three steps on: its mean is over two."""
    x, y = images()
    seen = []
    settings = {"cls_delay": 1, "cls_delay_unit": "steps"}
    watch = on_step(lambda state: seen.append(state.metrics.get("cross_entropy")))
    last = fit(atop(**settings), x, y, FitConfig(1, 4), progress=False, callbacks=[watch])
    assert seen[0] is None and last["cross_entropy"] == pytest.approx(float(sum(seen[1:])) / 2) and len(seen) == 3

    config = FitConfig(1, 4, checkpoint_seconds=0)
    with pytest.raises(Stopped):
        fit(atop(**settings), x, y, config, tmp_path, progress=False, callbacks=[StopAt(3)])
    assert fit(atop(**settings), x, y, config, tmp_path, progress=False) == last


def test_the_last_batch_is_kept_if_asked_and_epochs_are_cut_off():
    x, y = images(10)
    whole = InMemory(x, y, FitConfig(1, 4, drop_last=False), x.device)
    assert (whole.steps, whole.images) == (3, 10)
    assert [len(ids) for _, _, ids in whole.epoch(0, 0)] == [4, 4, 2]
    cut = InMemory(x, y, FitConfig(3, 4, steps_per_epoch=1), x.device)
    epochs = [torch.cat([ids for _, _, ids in cut.epoch(k, 0)]) for k in range(3)]
    assert all(len(ids) == 4 for ids in epochs) and (cut.steps, cut.images) == (1, 4)
    # every epoch draws from all images again
    assert len(set(torch.cat(epochs).tolist())) > 4
    with pytest.raises(ValueError, match=r"steps_per_epoch must be at most 2, the steps of a pass over .* got 3"):
        InMemory(x, y, FitConfig(1, 4, steps_per_epoch=3), x.device)
    with pytest.raises(ValueError, match="4 processes cannot share a last batch of 2 images"):
        InMemory(x, y, FitConfig(1, 4, drop_last=False), x.device, world=4)
    assert RunLength(2, 3, 4, 10).images_before(4) == 14 and RunLength(2, 3, 4, 10).last_batch == 2


def test_a_last_batch_that_carso_cannot_attack_is_refused_before_the_run():
    x, y = (255 * torch.rand(10, 1, 16, 16)).to(torch.uint8), torch.arange(10) % 10
    with pytest.raises(ValueError, match=r"adversarial_fraction 0\.5 of 2 images is too few"):
        fit(carso_task(kl_delay=0.0), x, y, FitConfig(1, 8, drop_last=False), progress=False)


def test_a_delay_in_images_needs_to_know_the_batch():
    x, y = images()
    batches = [(x[:4], y[:4]), (x[4:8], y[4:8])]
    assert "cross_entropy" in fit(atop(cls_delay=0), batches, None, FitConfig(1), progress=False)
    with pytest.raises(ValueError, match="give the delay in steps"):
        fit(atop(cls_delay=4), batches, None, FitConfig(2), progress=False)
    assert isinstance(fit(atop(cls_delay=1, cls_delay_unit="steps"), batches, None, FitConfig(1), progress=False), dict)


def test_the_doubled_range_of_the_released_code_reaches_the_classifier():
    """In the cross-entropy the classifier gets 2x - 1, where it gets x everywhere else."""
    x, y = images()
    for kind, negative in (("unit", False), ("doubled", True)):
        task, least = atop(cls_delay=0, classifier_range=kind), []
        task.defence.classifier.register_forward_pre_hook(lambda _, given, least=least: least.append(given[0].min()))
        fit(task, x, y, FitConfig(1, 4), progress=False)
        assert bool(min(least) < 0) is negative


# -- precisions --------------------------------------------------------------------------------------------------------


def float32_settings():
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


def carso(precision):
    return carso_task(kl_delay=0.0, precision=precision)


@pytest.mark.parametrize("make", [arrest_task, carso, atop_task, classifier_task])
def test_products_are_rounded_while_it_is_trained_if_asked(make):
    x = torch.randint(256, (16, *SHAPE), dtype=torch.uint8)
    before = float32_settings()
    for precision, expected in (("float32", (False, "highest")), ("tf32", (True, "high"))):
        noted = set()
        heard = small_runs.on_step(lambda _, noted=noted: noted.add(float32_settings()))
        task, config = make(precision=precision), FitConfig(epochs=1, batch_size=8)
        fit(task, x, torch.arange(16) % 10, config, callbacks=[heard], progress=False)
        assert noted == {expected} and float32_settings() == before


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
@pytest.mark.parametrize("make", [arrest_task, classifier_task])
def test_auto_computes_in_the_dtype_that_is_fast_on_the_device(make, fast, dtype, monkeypatch):
    monkeypatch.setattr("purify_fast.speed.precision.fast_bfloat16", lambda device: fast)
    assert make(precision="auto").dtype == dtype


def step(task):
    """Take a step. Return the task with its gradients, the loss, and the dtypes of its convolutions' outputs."""
    dtypes = set()
    for layer in task.model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, __, out: dtypes.add(out.dtype))
    if task.attacked is not None:
        # A copy is compared with its model in float32 when it is made.
        task.attacked.now(batch().x)
        dtypes.clear()
    loss, _ = task.training_step(batch())
    loss.backward()
    return task, loss.detach(), dtypes


CLASSIFIERS = [partial(classifier_task, attack=attack(eps=eps)) for eps in (0.0, 0.1)]


@pytest.mark.parametrize("make", [*CLASSIFIERS, arrest_task])
def test_products_are_rounded_and_weights_are_not(make):
    exact, loss, dtypes = step(make(precision="float32"))
    task, near, rounded = step(make(precision="bfloat16"))
    assert dtypes == {torch.float32} and rounded == {torch.bfloat16}
    assert near.dtype == torch.float32 and near.item() == pytest.approx(loss.item(), rel=0.01)
    for one, other in zip(task.model.parameters(), exact.model.parameters(), strict=True):
        assert one.dtype == one.grad.dtype == torch.float32 and torch.equal(one, other)
        assert nn.functional.cosine_similarity(one.grad.flatten(), other.grad.flatten(), 0) > 0.9
    assert task.describe() != exact.describe()
