"""The pipelines' benchmark: contestants compute the same, rows and tables say what was measured."""

import math
import multiprocessing
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import __main__ as program
from benchmarks.speed import pipelines, race, sheets, timing
from benchmarks.speed.flops import flop_of
from benchmarks.speed.pipelines import Case, Contestant, Job, atop_finetune, carso_inference, carso_training, expert
from benchmarks.speed.pipelines.carso_inference import latents
from purify_fast.speed.precision import float32_settings

CPU = torch.device("cpu")
CASES = [(name, case) for name, cases in pipelines.registry().items() for case in cases(True)]


@pytest.mark.slow
@pytest.mark.parametrize(("pipeline", "case"), CASES)
def test_every_contestant_computes_what_the_plain_form_does(pipeline, case):
    torch._dynamo.reset()
    chosen = pipelines.registry()[pipeline](True)[case]
    truth = None
    for label, contestant in chosen.contestants.items():
        job = contestant.make(CPU, True)
        result = job.result().double()
        truth = result if truth is None else truth
        assert torch.isfinite(result).all()
        assert (result - truth).norm() <= chosen.tolerance * truth.norm(), label
        # what counts must not refuse to attack a model
        assert label != "ours" or flop_of(job.run) > 0
        job.run()


class _Ops(TorchDispatchMode):
    """Notes the ops of this package that run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "purify_fast":
            self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("pipeline", "case"), CASES)
def test_the_expert_is_in_every_pipeline_and_has_pytorch_alone(pipeline, case):
    chosen = pipelines.registry()[pipeline](True)[case].contestants
    plain = next(iter(chosen))
    assert plain.startswith("plain") and {"expert", "expert, compiled", "ours", "ours, compiled"} < set(chosen)
    job = chosen["expert"].make(CPU, True)
    with _Ops() as ops:
        job.run()
    assert not ops.seen
    assert chosen["expert"].raised and chosen["expert"].raced


def test_the_expert_attacks_without_gradients_of_weights():
    """Neither of the trained network nor of the frozen copies; and what it steps by is the gradient of the images."""
    made = carso_training.ExpertTraining("pipeline", CPU, True, compiled=False)
    x, y, seen = made.batch.x, made.batch.y, []

    of_copy, latents = expert.loss_of(made.of_one_sample), made.latents().to(expert.DTYPES["cpu"])

    def loss(*inputs):
        seen.append(inputs[0])
        return of_copy(*inputs, latents)

    moved = expert.attack(expert.ascent(loss, CPU, False, False), x, y, 8 / 255, 2 / 255, 2) - x
    assert all(p.grad is None for p in made.made.parameters())
    copy = made.frozen.copies[0].model
    assert not any(p.requires_grad for p in copy.parameters())
    assert {p.dtype for p in copy.parameters()} == {expert.DTYPES["cpu"]}
    (gradient,) = torch.autograd.grad(loss(x.requires_grad_(), y), x)
    assert 0 < moved.abs().max() <= 4.01 / 255
    assert ((seen[1] - seen[0]).sign() == gradient.sign()).float().mean() > 0.95


def test_a_frozen_copy_folds_every_batchnorm_and_follows_the_training():
    network = carso_inference.classifier()
    copy = expert.FrozenCopy(network)
    norms = (torch.nn.BatchNorm2d, torch.nn.BatchNorm1d)
    assert len(copy.pairs) == 20 and not any(isinstance(part, norms) for part in copy.model.modules())
    x = torch.rand(2, 3, 32, 32)
    for _ in range(2):
        with torch.no_grad():
            right, found = network(x), copy.model(expert.entering(x)).float()
            assert (found - right).norm() < 0.02 * right.norm()
            for weight in network.parameters():
                weight.mul_(1.2)
        assert (copy.model(expert.entering(x)).float() - network(x)).norm() > 0.1 * right.norm()
        copy.refresh()


@pytest.mark.slow
def test_the_expert_compiles_a_whole_step_of_its_attack(monkeypatch):
    """The step and the gradient are in one graph without autograd, and it computes what the eager form does."""
    network = carso_inference.classifier()
    x, y, graphs = torch.rand(2, 3, 32, 32), torch.arange(2), []

    def backend(graph, inputs):
        graphs.append((graph, torch.is_grad_enabled()))
        return graph.forward

    loss = expert.loss_of(expert.FrozenCopy(network).model)
    right = expert.attack(expert.ascent(loss, CPU, False, True), x, y, 8 / 255, 2 / 255, 2)
    torch._dynamo.reset()
    whole = partial(torch.compile, backend=backend, fullgraph=True)
    monkeypatch.setattr(torch, "compile", lambda function, **options: whole(function))
    found = expert.attack(expert.ascent(loss, CPU, True, True), x, y, 8 / 255, 2 / 255, 2)
    assert [enabled for _, enabled in graphs] == [False]
    assert "sign" in str(graphs[0][0].graph)
    assert (found == right).float().mean() > 0.99


@pytest.mark.parametrize("raced", [False, True])
def test_cudnn_times_its_convolutions_for_the_expert_alone(raced, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    with Contestant(_other, True, raced=raced).settings(torch.device("cuda")):
        assert torch.backends.cudnn.benchmark == raced
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("enabled", [False, True])
def test_the_samples_of_plain_carso_are_a_part_of_the_batch(enabled):
    """Under vmap and autocast, a GPU refuses convolutions with a bias."""
    made = carso_inference.defence(CPU, True)
    model, x, z = carso_inference.Plain(made), carso_inference.images(4, made, CPU), latents(made, 4, CPU)
    seen = []
    model.made.classifier.register_forward_hook(
        lambda _, args, out: seen.append((len(args[0]), torch._C._are_functorch_transforms_active()))
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled):
        together, seen_together = model(x, z), seen.copy()
        alone = [model(x, one[None]) for one in z]
    # the first pass is that of the representation
    assert seen_together == [(4, False), (8, False)]
    for found, parts in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(found, torch.cat(parts), rtol=0, atol=0.05 if enabled else 1e-5)


class _Commands:
    """The other end of a contestant's pipe: one command, then the end."""

    def __init__(self, *commands):
        self.commands, self.answers = [*commands, None], []

    def recv(self):
        return self.commands.pop(0)

    def send(self, answer):
        self.answers.append(answer)


@pytest.mark.parametrize("tf32", [False, True])
def test_float32_is_ieees_but_for_the_column_of_tf32(tf32, monkeypatch):
    """PyTorch rounds the operands of convolutions on a GPU by default; the settings are put back after a job."""
    seen = []
    now = lambda: seen.append(float32_settings()[0]) or torch.ones(2)  # noqa: E731
    job = Job(now, now)
    contestants = {"plain": Contestant(lambda device, quick: now() is None or job, False, tf32)}
    monkeypatch.setattr(race, "registry", lambda: {"some": lambda quick: {"case": Case("", 0.1, contestants)}})
    before, threads, pipe = float32_settings(), torch.get_num_threads(), _Commands("result", "time")
    race._work(pipe, "some", "case", "plain", "cpu", True, threads)
    assert all(done for done, _ in pipe.answers) and len(seen) >= 3
    assert set(seen) == {(True, "high") if tf32 else (False, "highest")}
    assert float32_settings() == before


@pytest.mark.parametrize("threads", [1, 2])
def test_a_run_in_one_thread_is_measured_in_processor_time(threads, monkeypatch):
    job = Job(lambda: time.sleep(0.3), lambda: torch.ones(2))
    contestants = {"plain": Contestant(lambda device, quick: job, False)}
    monkeypatch.setattr(race, "registry", lambda: {"some": lambda quick: {"case": Case("", 0.1, contestants)}})
    pipe, before = _Commands("time"), torch.get_num_threads()
    try:
        race._work(pipe, "some", "case", "plain", "cpu", True, threads)
    finally:
        torch.set_num_threads(before)
    ((done, spent),) = pipe.answers
    assert done and (spent < 0.2 if threads == 1 else spent >= 0.3)


@pytest.mark.slow
def test_a_fine_tuning_step_that_is_wrong_is_seen(monkeypatch):
    """Weights of a fresh generator would paint grey, and a step without its gates would agree with what is right."""
    chosen = pipelines.registry()["atop_finetune"](True)["fine-tuning step"]
    lean = chosen.contestants["expert"].make
    truth = lean(CPU, True).result()
    monkeypatch.setattr(atop_finetune.PlainGate, "forward", lambda self, x: F.elu(self.conv(x).chunk(2, 1)[0]) / 2)
    assert (lean(CPU, True).result() - truth).norm() > 1.2 * chosen.tolerance * truth.norm()


@pytest.mark.slow
def test_quick_run_writes_rows_and_tables(tmp_path, capsys, monkeypatch, forking):
    case = pipelines.registry()["carso_inference"](True)["prediction"]
    contestants = {label: case.contestants[label] for label in ("plain", "expert", "ours")}
    few = {"carso_inference": lambda quick: {"prediction": replace(case, contestants=contestants)}}
    monkeypatch.setattr(race, "registry", lambda: few)
    monkeypatch.setattr(pipelines, "registry", lambda: few)
    program.main(["pipelines", "carso_inference", "--quick", "--out", str(tmp_path)])
    rows = sheets.read_csv(tmp_path / sheets.PIPELINES)
    assert [row["contestant"] for row in rows] == list(contestants)
    for row in rows:
        assert row["verdict"] == "right" and row["torch"] == torch.__version__
        assert math.isclose(float(row["speed_up"]), float(rows[0]["ms"]) / float(row["ms"]), rel_tol=0.05)
    table = (tmp_path / sheets.PIPELINES_TABLE).read_text()
    assert table in capsys.readouterr().out and "| expert |" in table
    (tmp_path / sheets.PIPELINES_TABLE).unlink()
    sheets.report(tmp_path)
    assert (tmp_path / sheets.PIPELINES_TABLE).read_text() == table


def test_the_memory_of_a_run_is_what_it_has_at_once():
    def work():
        first = torch.ones(10**6)
        del first
        second = torch.ones(2 * 10**6)
        return second + 1

    assert 16e6 <= timing.allocated(work, CPU) < 17e6


def _other(device, quick):
    return Job(lambda: None, lambda: torch.ones(3))


class _Fake:
    """A contestant's process. Each run takes longer than the one before, as on a machine that others use."""

    answers = {"plain": torch.ones(3), "ours": torch.ones(3) * 1.1}  # noqa: RUF012
    seconds = {"plain": 2.0, "ours": 1.0}  # noqa: RUF012
    lucky = None

    def __init__(self, pipeline, case, label, *rest):
        self.label, self.slower = label, 0

    def order(self, *commands):
        pass

    def answer(self, command, seconds):
        return self.ask(command)

    def ask(self, command, seconds=math.inf):
        self.slower += command == "time"
        time = self.seconds[self.label] * self.slower * (0.1 if (self.label, self.slower) == self.lucky else 1)
        result = self.answers[self.label].numpy()
        other = {"flops": 10**9, "rate": 4e9, "memory": 3 * 10**6}
        return {"result": result, "time": time, **other}[command]

    def end(self, at_once):
        assert not at_once


def test_a_wrong_contestant_has_no_number(monkeypatch):
    monkeypatch.setattr(race, "Process", _Fake)
    contestants = {label: Contestant(_other, False) for label in _Fake.answers}
    wrong = race.race("p", "c", Case("shape", 0.05, contestants), CPU, True)
    assert [row["verdict"] for row in wrong] == ["right", "wrong"] and wrong[1]["ms"] == ""
    right = race.race("p", "c", Case("shape", 0.15, contestants), CPU, True)[1]
    assert (right["ms"], right["speed_up"], right["share_of_matrix_rate"]) == ("2500.00", "2.00", "0.100")
    assert right["peak_MB"] == "3" and wrong[1]["peak_MB"] == ""
    assert "wrong" in sheets.pipelines_markdown([{**row} for row in wrong])


def _sleeping(device, quick):
    time.sleep(600)


def _broken(device, quick):
    raise ValueError("what went wrong")


@pytest.mark.slow
def test_a_limit_covers_the_preparation(monkeypatch, capsys, forking):
    """What is not ready in time, or cannot be made, is left out, unless the others are measured against it."""
    makes = {"plain": _other, "broken": _broken, "not ready": _sleeping, "ours": _other}
    case = Case("shape", 0.05, {label: Contestant(make, False) for label, make in makes.items()})
    monkeypatch.setattr(race, "registry", lambda: {"p": lambda quick: {"c": case}})
    began = time.monotonic()
    rows = race.race("p", "c", case, CPU, True, 20.0)
    assert 20 * 2 / 3 < time.monotonic() - began < 60
    wanted = {"plain": "right", "not ready": "left out", "broken": "failed", "ours": "right"}
    assert {row["contestant"]: row["verdict"] for row in rows} == wanted
    assert "p c, broken: " in (said := capsys.readouterr().err) and "what went wrong" in said
    case = Case("shape", 0.05, case.contestants | {"ours": Contestant(_sleeping, False)})
    with pytest.raises(TimeoutError, match="'result' of a compared implementation was not finished in time"):
        race.race("p", "c", case, CPU, True, 1.0)
    assert not multiprocessing.active_children()
