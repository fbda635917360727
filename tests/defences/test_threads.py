"""Defences in several threads, copied and pickled."""

import copy
import io
import threading

import denoisers
import pytest
import torch
from small_models import atop, carso, images

from purify_fast import frozen_copy
from purify_fast.defences import NoisyEnsemble
from purify_fast.methods.carso import Carso
from purify_fast.methods.diffusion import Process
from purify_fast.models.classifiers import SmallCNN
from purify_fast.ops import aggregate


def diffusion():
    return denoisers.defence((1, 16, 16), process=Process(steps=3), samples=2)


MADE = {
    "CARSO": carso,
    "AToP": atop,
    "diffusion": diffusion,
    "copy of CARSO": lambda: frozen_copy(carso(), torch.rand(2, 1, 16, 16), dtype=torch.float32),
    "copy of diffusion": lambda: frozen_copy(diffusion(), torch.rand(2, 1, 16, 16), dtype=torch.bfloat16),
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
        assert torch.equal(defence(x), want) and not torch.equal(made(x), want)


# -- noisy copies: the control that purifies nothing -------------------------------------------------------------------


def control(sigma=0.2, samples=4):
    torch.manual_seed(0)
    return NoisyEnsemble(SmallCNN(width=4), sigma, samples)


def test_it_is_the_classifier_on_noisy_copies():
    made, x = control(), images(3)
    with made.fixed_noise(5):
        logits = made.sample_logits(x)
        assert logits.shape == (3, 4, 10)
        torch.testing.assert_close(made(x), aggregate(logits, "lse"))
        torch.testing.assert_close(made.sample_logits(x.flip(0)), logits.flip(0))
        assert not torch.allclose(logits[:, 0], logits[:, 1])
    assert not torch.equal(made(x), made(x))
    with made.deterministic():
        torch.testing.assert_close(made(x), made.classifier(x))
    seen = []
    made.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    many = control(0.1, 64)
    many.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    many(torch.full((8, 1, 16, 16), 0.5))
    assert abs(float(seen[0].std()) - 0.1) < 0.005 and abs(float(seen[0].mean()) - 0.5) < 0.005
    assert seen[0].min() >= 0 and seen[0].max() <= 1


@pytest.mark.parametrize(("sigma", "samples"), [(-0.1, 4), (float("nan"), 4), (0.1, 0)])
def test_refusals(sigma, samples):
    with pytest.raises(ValueError, match="sigma must be at least 0 and samples at least 1, got sigma="):
        control(sigma, samples)
