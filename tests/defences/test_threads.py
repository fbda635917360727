"""Defences in several threads and processes, copied and pickled; and the mode in which they start."""

import copy
import importlib
import io
import multiprocessing
import sys
import threading
from pathlib import Path

import denoisers
import pytest
import torch
from torch.utils.data import DataLoader

from purify_fast.methods.atop import Atop, SmallGenerator
from purify_fast.methods.carso import Carso
from purify_fast.methods.diffusion import Process
from purify_fast.models.classifiers import SmallCNN

pytestmark = pytest.mark.usefixtures("one_thread")


def carso():
    torch.manual_seed(0)
    return Carso(SmallCNN(width=4), ["conv2", "hidden"], (1, 16, 16), 8, 4, 2, decoder_width=2)


def atop():
    torch.manual_seed(0)
    return Atop(SmallCNN(width=4), SmallGenerator(1, width=2), (1, 16, 16), block=4)


def diffusion():
    return denoisers.defence((1, 16, 16), process=Process(steps=3), samples=2)


MADE = {
    "CARSO": carso,
    "AToP": atop,
    "diffusion": diffusion,
    "CARSO, accelerated": lambda: carso().accelerate(torch.float32),
    "diffusion, accelerated": lambda: diffusion().accelerate(torch.bfloat16),
}


def in_threads(work, count=4):
    """What ``work(i)`` gives in as many threads at once, or the errors they raise."""
    found, ready = [None] * count, threading.Barrier(count)

    def run(i):
        # the number of threads of an operator is each thread's own; with another one sums have other last bits
        torch.set_num_threads(1)
        ready.wait()
        try:
            found[i] = work(i)
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("kind", MADE)
def test_several_threads_predict_and_differentiate_at_once(kind):
    """Once, 4 of 49 results of two threads were wrong and 15 calls raised an error about None."""
    defence = MADE[kind]()
    generator = torch.Generator().manual_seed(1)
    x = [torch.rand(5, 1, 16, 16, generator=generator) for _ in range(4)]
    z = torch.randn(1, 2, 4, generator=generator)

    def predict(i):
        # given latents: the result is a function of the images
        call = (lambda x: defence.sample_logits(x, z)) if isinstance(defence, Carso) else defence.classifier
        leaf = x[i].clone().requires_grad_()
        with torch.no_grad():
            logits = [call(x[i]) for _ in range(30)]
        return [*logits, torch.autograd.grad(call(leaf).square().sum(), leaf)[0]]

    want = [predict(i) for i in range(4)]
    for i, results in enumerate(in_threads(predict)):
        assert not isinstance(results, Exception), results
        assert all(torch.equal(result, value) for result, value in zip(results, want[i], strict=True))


@pytest.mark.parametrize("mode", ["fixed_noise", "deterministic", "noise_ids"])
@pytest.mark.parametrize("kind", ["CARSO", "AToP"])
def test_a_thread_that_decides_over_the_noise_has_the_defence_for_itself(kind, mode):
    defence, x = MADE[kind](), torch.rand(2, 1, 16, 16)
    argument = {"fixed_noise": (1,), "deterministic": (), "noise_ids": (torch.arange(2),)}[mode]
    with getattr(defence, mode)(*argument):
        defence(x)
        (other,) = in_threads(lambda i: defence(x), 1)
        assert isinstance(other, RuntimeError) and "give each thread a copy.deepcopy of the defence" in str(other)
        (inner,) = in_threads(lambda i: defence.fixed_noise(2).__enter__(), 1)
        assert isinstance(inner, RuntimeError)
        with defence.fixed_noise(2):
            defence(x)
        defence(x)
    (after,) = in_threads(lambda i: defence(x), 1)
    assert isinstance(after, torch.Tensor)


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_copies_predict_the_same_and_are_their_own(kind, how):
    defence, x = MADE[kind](), torch.rand(2, 1, 16, 16)
    if how == "deepcopy":
        made = copy.deepcopy(defence)
    else:
        file = io.BytesIO()
        torch.save(defence, file)
        file.seek(0)
        made = torch.load(file, weights_only=False)
    with defence.fixed_noise(1), made.fixed_noise(1), torch.no_grad():
        want = defence(x)
        assert torch.equal(made(x), want)
        for parameter in made.parameters():
            parameter.zero_()
        if made.acceleration is not None:
            made.refresh()
        assert torch.equal(defence(x), want) and not torch.equal(made(x), want)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "start"), [("CARSO", "fork"), ("AToP", "fork"), ("CARSO", "spawn")])
def test_in_the_processes_of_a_data_loader(kind, start, monkeypatch):
    if sys.platform == "win32" and start == "fork":
        pytest.skip("Windows has no fork")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    data = importlib.import_module("purified").Purified(MADE[kind]())
    loader = DataLoader(data, 3, num_workers=2, multiprocessing_context=multiprocessing.get_context(start))
    found = torch.cat(list(loader))
    # another number of threads sums in another order
    torch.testing.assert_close(found, torch.stack([data[i] for i in range(6)]), rtol=1e-4, atol=1e-4)
