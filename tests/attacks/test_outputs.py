"""What a model returns, where an attack is called without an evaluation; and models that refuse a batch."""

import copy
import warnings

import pytest
import torch
from torch import nn

from purify_fast.attacks import APGD, BPDA, FABT, FGSM, PGD, BranchAndBound, Square, StAdv, attacked_model, frozen, pgd
from purify_fast.attacks.attacked_model import returning_logits
from purify_fast.attacks.outputs import LogitsOf
from purify_fast.evaluation import as_attack

pytestmark = pytest.mark.usefixtures("one_thread")

ATTACKS = {
    "pgd": PGD(steps=2),
    "fgsm": FGSM(),
    "apgd": APGD(steps=2),
    "targeted": APGD(steps=2, loss="margin_targeted"),
    "fab": FABT(steps=9),
    "square": Square(n_queries=5),
    "stadv": StAdv(steps=2, random_start=True),
    "restarts, several draws": PGD(steps=2, restarts=2, eot_iter=3),
    "function": as_attack(lambda model, x, y: (x + 0.05 * slope(model, x).sign()).clamp(0, 1)),
}


def slope(model, x):
    return torch.autograd.grad(model(x.requires_grad_()).square().sum(), x)[0]


class Output:
    def __init__(self, logits):
        self.logits = logits


BAD = {
    "one logit": (lambda z: z[:, :1], ValueError, r"a single number for each image, \[\d, 1\].*torch.cat"),
    "no second dimension": (lambda z: z[:, 0], ValueError, r"a single number for each image, \[\d\].*torch.stack"),
    "class": (lambda z: z.argmax(1), ValueError, r"whole number .* \[\d\].*this looks like the class.*without argmax"),
    "tuple": (lambda z: (z, None), TypeError, r"If the logits are member 0, give lambda x: model\(x\)\[0\]"),
    "nothing": (lambda z: None, TypeError, "the name logits, got NoneType$"),
    "whole numbers": (lambda z: (9 * z).int(), ValueError, "floating point, got torch.int32 .*return output.float()"),
    "transposed": (lambda z: z.T, ValueError, r"got \[6, (\d)\] for \1 images: are they transposed\? Return logits.T"),
    "one row": (lambda z: z[:1], ValueError, r"got \[1, 6\] for \d images: does it mix or drop images"),
    "maps": (
        lambda z: z[:, :, None],
        ValueError,
        r"must return logits \[B, classes\], got \[(\d), 6, 1\] for \1 images$",
    ),
}


@pytest.mark.parametrize(("attack", "output"), zip(ATTACKS, BAD, strict=True))
def test_an_attack_refuses_an_output_that_is_not_logits(model, batch, attack, output):
    """The same check serves all attacks. So each attack gets a single bad output, and PGD gets each bad output."""
    change, error, message = BAD[output]
    with pytest.raises(error, match=message):
        ATTACKS[attack](lambda x: change(model(x)), *batch, eps=0.1)
    with pytest.raises(error, match=message):
        pgd(lambda x: change(model(x)), *batch, eps=0.1, steps=2)


@pytest.mark.parametrize("attack", ATTACKS)
def test_logits_in_an_object_or_mapping_are_used(batch, attack):
    """The attack finds the images that it finds for the logits themselves; the images of each are compared."""
    torch.manual_seed(0)
    x, model = batch[0], nn.Sequential(nn.Flatten(), nn.Linear(192, 6))
    y = model(x).argmax(1)
    plain = ATTACKS[attack](lambda z: model(z), x, y, eps=0.3)
    assert not torch.equal(plain, x)
    for output in (Output, lambda logits: {"logits": logits, "loss": None}):
        assert torch.equal(ATTACKS[attack](lambda z, output=output: output(model(z)), x, y, eps=0.3), plain)


def test_a_defence_and_a_relu_network_may_return_objects():
    torch.manual_seed(0)

    class Network(nn.Sequential):
        def forward(self, x):
            return {"logits": super().forward(x)}

    class Purifier(nn.Module):
        def __init__(self, classifier, draws=1):
            super().__init__()
            self.classifier, self.draws = classifier, draws

        def purify(self, x):
            return torch.stack([x.round(decimals=1)] * self.draws, 1) if self.draws > 1 else x.round(decimals=1)

        def forward(self, x):
            return self.classifier(x.round(decimals=1))

    layers = nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)
    x = torch.rand(6, 1, 4, 4)
    y = nn.Sequential(*layers)(x).argmax(1)
    for attack in (BranchAndBound(), FGSM()):
        found = [attack(kind(*layers), x, y, eps=0.5) for kind in (Network, nn.Sequential)]
        assert torch.equal(*found) and not torch.equal(found[0], x)
    for draws in (1, 2):
        found = [BPDA(steps=3)(Purifier(kind(*layers), draws), x, y, eps=0.1) for kind in (Network, nn.Sequential)]
        assert torch.equal(*found) and not torch.equal(found[0], x)


def test_the_output_is_checked_without_a_further_pass(model, batch):
    """An attack that is called directly calls the model as often as one within an evaluation, which has checked it."""
    x, y = batch
    passes = []

    def counted(z):
        passes.append(len(z))
        return model(z)

    PGD(steps=3, keep_best=False)(counted, x, y, eps=0.1)
    assert passes == [9, 9, 9]
    passes.clear()
    FGSM()(counted, x, y, eps=0.1)
    assert passes == [9]


def test_nan_and_probabilities_are_warned_of(model, batch):
    """They are seen in the first output; each text is shown once by default."""
    x, y = batch
    with pytest.warns(UserWarning, match="returns NaN for some images: an attack cannot move them"):
        PGD(steps=2)(lambda z: model(z) / (torch.arange(len(z)) > 0)[:, None] - torch.inf, x, y, eps=0.1)
    with pytest.warns(UserWarning, match="returns probabilities, not logits: return the logits before the softmax"):
        pgd(lambda z: model(z).softmax(1), x, y, eps=0.1, steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pgd(model, x, y, eps=0.1, steps=2)
        # the rest of an attack is not read, and neither is a model outside of an attack
        calls = iter(range(9))
        pgd(lambda z: model(z) if next(calls) == 0 else model(z) + torch.nan, x, y, eps=0.1, steps=2)
        attacked_model.logits_of(lambda z: model(z).softmax(1), x)


# -- models that do not accept a batch --------------------------------------------------------------------------------


class Squeezed(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).squeeze()


@pytest.mark.parametrize("images", [9, 1])
def test_a_squeezed_batch_is_named(model, batch, images):
    x, y = (part[:images] for part in batch)
    message = r"got \[6\] for 1 image: does it squeeze the batch\? Use flatten\(1\), or give squeeze the dimension"
    with pytest.raises(ValueError, match=message):
        returning_logits(Squeezed(model), x)
    with pytest.raises(ValueError, match=message):
        PGD(steps=2)(Squeezed(model), x[:1], y[:1], eps=0.1)
    with pytest.raises(ValueError, match=r"got \[6, 1\] for 1 image: are they transposed"):
        PGD(steps=2)(lambda z: model(z).T, x[:1], y[:1], eps=0.1)


def test_as_many_images_as_classes_hide_no_transposed_logits(model):
    with pytest.raises(ValueError, match=r"got \[6, 1\] for 1 image: are they transposed"):
        returning_logits(lambda z: model(z).T, torch.rand(6, 3, 8, 8))


def test_a_batch_size_in_the_model_is_named(model, batch):
    x, y = batch
    net = nn.Linear(192, 6)
    message = r"must accept every batch size.*It runs on {} images?, but fails on {} .*write x.flatten\(1\)"
    for size, runs, fails in ((9, 9, 1), (7, 7, 9), (1, 1, 9)):
        fixed = lambda z, size=size: net(z.reshape(size, -1))  # noqa: E731
        with pytest.raises(ValueError, match=message.format(runs, rf"{fails} images?")):
            returning_logits(fixed, x)
        if fails > 1:
            with pytest.raises(ValueError, match=message.format(runs, rf"{fails} images?")):
                PGD(steps=2)(fixed, x, y, eps=0.1)
    # the batch of this attack shrinks when images fall, or when one is left over
    with pytest.raises(ValueError, match=message.format(4, "1 image")):
        PGD(steps=2)(lambda z: net(z.reshape(4, -1)), x[:4], y[:4], eps=0.1, max_forward_batch=3)
    norm = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), net).train()
    with pytest.raises(ValueError, match=r"runs on 9 images, but fails on 1 .*call eval\(\) on the modules that"):
        returning_logits(lambda z: norm(z), x)
    static = torch.export.export(model.eval(), (x,)).module()
    with pytest.raises(ValueError, match=r"runs on 9 images, but fails on 1 image .*Guard failed.*: export it with a"):
        returning_logits(static, x)
    with pytest.raises(ValueError, match=r"runs on 9 images, but fails on 4 images .*export it with a dynamic"):
        PGD(steps=2)(static, x[:4], y[:4], eps=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_dtype(model, batch, dtype):
    """An attack names them; an evaluation converts the images, as the advice does."""
    x, y = batch
    other = copy.deepcopy(model).to(dtype).eval()
    cure = rf"give x.to\({dtype}\)" if dtype == torch.float64 else rf"give lambda x: model\(x.to\({dtype}\)\).float\(\)"
    for called in (other, lambda z: other(z)):
        with pytest.raises(ValueError, match=rf"weights are {dtype}, but the images are torch.float32: {cure}"):
            APGD(steps=2)(called, x, y, eps=0.1)
        made, classes = returning_logits(called, x)
        assert isinstance(made, LogitsOf) and classes == 6
        assert made(x).dtype == torch.promote_types(dtype, torch.float32)
    advised = (lambda z: other(z.to(dtype)).float()) if dtype != torch.float64 else (lambda z: other(z.to(dtype)))
    assert torch.equal(APGD(steps=2)(made, x, y, eps=0.1), APGD(steps=2)(advised, x, y, eps=0.1))
    # a model that converts the images itself is left as it is
    assert returning_logits(advised, x)[0] is advised


def test_a_module_without_modes_is_attacked_and_restored(model, batch):
    x, y = batch
    exported = torch.export.export(
        model.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("b", min=1, max=99)},)
    ).module()
    modes = [module.training for module in exported.modules()]
    with frozen(exported):
        assert not any(module.training for module in exported.modules())
    assert [module.training for module in exported.modules()] == modes
    assert torch.allclose(PGD(steps=3)(exported, x, y, eps=0.1), PGD(steps=3)(model, x, y, eps=0.1), atol=1e-6)


def test_weights_made_in_inference_mode_are_named(batch):
    with torch.inference_mode():
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 6))
    for attack in (PGD(steps=2), APGD(steps=2), FABT(steps=2)):
        with pytest.raises(ValueError, match=r"made within torch.inference_mode\(\), .* give copy.deepcopy\(model\)"):
            attack(net, *batch, eps=0.1)
    assert all(parameter.requires_grad for parameter in net.parameters())
    PGD(steps=2)(copy.deepcopy(net), *batch, eps=0.1)


def test_errors_of_other_kinds_stay_as_they_are(model, batch):
    """A model's own error; one after the first calls; and that memory ran out, after which nothing is tried."""
    x, y = batch
    calls = []

    def broken(error):
        def call(z):
            calls.append(len(z))
            if len(calls) > 2:
                raise error
            return model(z)

        return call

    for error in (RuntimeError("out of order"), KeyError("out of order")):
        calls.clear()
        with pytest.raises(type(error), match="out of order"):
            PGD(steps=9)(broken(error), x, y, eps=0.1)
    calls.clear()
    with pytest.raises(torch.OutOfMemoryError):
        PGD(steps=9)(broken(torch.OutOfMemoryError("CUDA out of memory")), x, y, eps=0.1)
    assert len(calls) == 3


def test_an_error_leaves_the_statistics_of_a_module_in_training_mode(batch):
    """The calls that find the reason are made in evaluation mode."""
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 6)).half().train()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"weights are torch\.float16"):
        PGD(steps=2)(net, *batch, eps=0.1)
    assert net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
