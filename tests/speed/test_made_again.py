"""A copy is made again with all that its model holds, and writes to nothing that it has not made itself."""

import copy
import threading

import pytest
import torch
from small_models import Made
from torch import nn

import purify_fast
from purify_fast import Carso
from purify_fast.attacks import pgd
from purify_fast.defences import MajorityVote, WithAggregation
from purify_fast.defences.base import Defence
from purify_fast.defences.stochastic import with_samples
from purify_fast.speed.reading import reading

pytestmark = pytest.mark.usefixtures("one_thread")
F = torch.float32
X, Y = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(8, dtype=torch.long)


def conv(*more):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    return nn.Sequential(*layers, *more, nn.Linear(32, 5)).eval()


def carso(classifier, layer="2"):
    return Carso(classifier, [layer], (3, 8, 8), cond_dim=8, latent_dim=4, samples=4, decoder_width=2).eval()


def close(model, fast):
    return torch.allclose(fast(X), model(X), atol=1e-4)


def keeps_input(self, x):
    self.kept = x
    return self.net(x)


def keeps_output(self, x):
    self.kept = self.net(x)
    return self.kept


def keeps_weight(self, x):
    self.kept = self.net[5].weight.detach()
    return self.net(x)


def gives_memory(self, x):
    self.kept.data = x
    return self.net(x)


@pytest.mark.parametrize("how", [keeps_input, keeps_output, keeps_weight, gives_memory])
def test_what_a_forward_pass_keeps_is_never_written_to(how):
    model = Made(how, net=conv()).eval()
    model.register_buffer("kept", torch.zeros_like(X)) if how is gives_memory else None
    model(torch.rand_like(X))
    fast, images = purify_fast.frozen_copy(model, X, dtype=F), X.clone()
    logits = fast(images)
    before = logits.detach().clone()
    model.net[5].weight.data.mul_(-2)
    fast.update()
    pgd(fast, images, Y, 0.1, steps=2)
    assert torch.equal(images, X) and torch.equal(logits, before) and close(model, fast)


@pytest.mark.parametrize("dtype", [F, torch.bfloat16])
def test_the_autocast_of_the_caller_does_not_decide_how_a_copy_is_made(dtype, recwarn):
    model = conv()
    nn.init.uniform_(model[1].running_mean, -1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        fast = purify_fast.frozen_copy(model, X, dtype=dtype)
    assert fast.dtype == dtype and fast.folded == 1 and not recwarn.list


@pytest.mark.parametrize("keeps", [True, False])
def test_a_copy_keeps_the_modes_that_its_model_had_when_it_was_made(keeps):
    model = conv(nn.Dropout(0.5))
    defence = carso(model)
    for one in (model, defence.classifier):
        one[1].train(keeps), one[5].train(keeps)
    copies = [purify_fast.frozen_copy(one, X, dtype=F) for one in (model, defence)]
    assert copies[0].folded == 1 - keeps
    for one in (model, defence.classifier):
        one[1].train(not keeps), one[5].train(not keeps)
    # It is made again, because an attribute has changed.
    model[2].inplace = defence.classifier[2].inplace = True
    for fast, network in zip(copies, (copies[0].classifier, copies[1].classifier.classifier), strict=True):
        fast.update()
        assert network[5].training == network[1].training == keeps or not keeps
        assert torch.equal(fast.classifier(X), fast.classifier(X)) is not keeps


def test_tensors_that_share_memory_share_it_in_the_copy():
    def forward(self, x):
        self.whole.add_(1)
        return self.net(x) * self.part.sum()

    model = Made(forward, net=conv()).eval()
    model.register_buffer("whole", torch.ones(4))
    model.register_buffer("part", model.whole[:2])
    want = copy.deepcopy(model)(X)
    fast = purify_fast.frozen_copy(model, X, dtype=F)
    assert torch.allclose(fast(X), want, atol=1e-4) and float(model.whole[0]) == 1


class TwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = conv()
        self.again = self.net[0]

    def forward(self, x):
        return self.net(x)


class Sized(nn.Module):
    """A layer that keeps the size of its weight as a number."""

    def __init__(self):
        super().__init__()
        self.weight, self.size = nn.Parameter(torch.ones(5)), 1.0

    def sized(self):
        self.size = float(self.weight.detach().abs().sum())
        return self

    def forward(self, x):
        return x * self.weight / self.size


class SizedInCopies(Sized):
    def __deepcopy__(self, memo):
        other = SizedInCopies()
        other.weight.data = self.weight.detach().clone()
        return other.sized()


class SizedInStates(Sized):
    def __setstate__(self, state):
        super().__setstate__(state)
        self.sized()


class SizedInModes(Sized):
    def eval(self):
        return super().eval().sized()

    def train(self, mode=True):
        super().train(mode)
        return self.sized()


class Size:
    """An object that reads a weight when it is copied."""

    def __init__(self, weight):
        self.weight, self.size = weight, float(weight.detach().abs().sum())

    def __deepcopy__(self, memo):
        return Size(copy.deepcopy(self.weight, memo))


class SizedByObject(Sized):
    def __init__(self):
        super().__init__()
        self.own = Size(self.weight)

    def sized(self):
        self.own = Size(self.weight)
        return self

    def forward(self, x):
        return x * self.weight / self.own.size


class WithMode(nn.Module):
    noise_modes = frozenset({"factor"})
    factor = 1.0

    def forward(self, x):
        return x * self.factor


class Attributed(dict):
    pass


def test_generators_in_containers_are_shared():
    model = Made(lambda self, x: self.net(x + torch.rand(x.shape, generator=self.own["noise"])), net=conv()).eval()
    model.own = {"noise": torch.Generator().manual_seed(0)}
    fast = purify_fast.frozen_copy(model, X, dtype=F)
    first = fast(X)
    fast.update()
    assert not torch.equal(first, fast(X)) and not torch.allclose(first, model(X), atol=1e-5)


def test_weights_from_inference_mode_are_read_at_every_call():
    model = conv().requires_grad_(False)
    with torch.inference_mode():
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    fast = purify_fast.frozen_copy(model, X, dtype=F)
    assert "because a tensor was made in inference mode" in fast.about
    with torch.inference_mode():
        model[5].weight.mul_(3)
    with torch.no_grad():
        assert close(model, fast)


def test_copies_that_functions_hide_read_when_an_attack_begins():
    model = conv()
    fast = purify_fast.frozen_copy(model, X, dtype=F)

    def outer(function):
        return lambda images: function(images / 2)

    for attacked in (MajorityVote(lambda images: fast(images), 1), outer(outer(fast))):
        model[5].weight.data.mul_(-2)
        pgd(attacked, X, Y, 0.1, steps=1)
        assert close(model, fast)


def test_a_copy_that_writes_to_its_model_is_refused():
    model = Made(lambda self, x: self.net(x), net=conv()).eval()
    model.register_buffer("count", torch.zeros(1))
    model.net[0].register_forward_hook(lambda module, given, out: model.count.add_(1) and None)
    with pytest.raises(TypeError, match="must not be written to by its own copy"):
        purify_fast.frozen_copy(model, X, dtype=F)


def test_two_defences_with_the_parts_of_one_copy_follow_it_both():
    defence = carso(conv())
    fast = purify_fast.frozen_copy(defence, X, dtype=F)
    few = with_samples(fast, 2)
    defence.classifier[2].inplace = True
    fast.update(), few.update()
    with torch.no_grad():
        defence.classifier[0].weight.mul_(-1.5)
    fast(X), few(X)
    for one in (fast, few):
        assert torch.allclose(defence.read(X)[0], one.read(X)[0], atol=1e-4)
    reads = fast._followed.reads
    for _ in range(3):
        fast(X), few(X)
    assert fast._followed.reads == reads


def test_every_way_to_predict_reads_a_defence_with_tensors_in_lists():
    classifier = Made(lambda self, x: self.net(x) * self.held[0], net=conv()).eval()
    classifier.held = [torch.ones(1)]
    defence = carso(classifier, "net.2")
    fast = purify_fast.frozen_copy(defence, X, dtype=F)
    defence.classifier.held[0].fill_(-3.0)
    with fast.deterministic(), defence.deterministic(), torch.no_grad():
        want = defence(X)
        sampled = fast.aggregate(fast.sample_logits(X))
        for got in (sampled, WithAggregation(fast, "lse", deterministic=True)(X), fast.draw_logits(X, 1)[0], fast(X)):
            assert torch.allclose(got, want, atol=1e-4)


class Strong(Defence):
    """A defence of a user's own, with a tensor that is neither a parameter nor a buffer."""

    aggregation, purifier_dtype = "mean", F

    def __init__(self, classifier):
        super().__init__(classifier, (3, 8, 8))
        self.arguments, self.num_classes, self.samples = {}, 5, 1
        self.net, self.strength = nn.Conv2d(3, 3, 1), torch.ones(1)
        self._ready()

    def purify(self, x, draws=1):
        self.check_images(x)
        return (self.net(x) * self.strength)[:, None].repeat(1, draws, 1, 1, 1)


def test_what_cannot_be_copied_is_an_error_that_says_so():
    model = conv()
    model[0].lock = threading.Lock()
    with pytest.raises(TypeError, match="Sequential holds an object that cannot be copied"):
        purify_fast.frozen_copy(model, X)


def test_a_copy_reads_once_in_a_block_and_a_block_inside_has_a_number_of_its_own():
    model = conv().append(SizedInModes().sized()).eval()
    fast = purify_fast.frozen_copy(model, X, dtype=F)
    with reading():
        fast(X), fast(X)
        network, reads = fast.classifier, [fast._followed.reads]
        fast(X)
        assert fast.classifier is network and fast._followed.reads == reads[0]
        with reading(fast):
            reads.append(fast._followed.reads)
            fast(X)
        fast(X)
        reads.append(fast._followed.reads)
    assert reads[0] < reads[1] == reads[2]
    fast(X)
    assert fast._followed.reads > reads[2]


def test_given_tensors_serve_in_a_functional_call_although_a_read_is_due():
    model = conv()
    fast = purify_fast.frozen_copy(model, X, dtype=F)
    given = {name: 3 * value for name, value in fast.state_dict().items()}
    want = torch.func.functional_call(fast, given, (X,))
    model[5].weight.detach().mul_(-1)
    assert torch.equal(torch.func.functional_call(fast, given, (X,)), want) and close(model, fast)


@pytest.mark.parametrize("first", ["copy", "model"])
def test_a_copy_that_is_copied_with_its_model_in_any_order_follows_the_copied_model(first):
    model = conv()
    pair = {"model": model, "copy": purify_fast.frozen_copy(model, X, dtype=F)}
    pair = copy.deepcopy({first: pair[first], **pair})
    pair["model"][5].weight.detach().mul_(-1)
    assert close(pair["model"], pair["copy"]) and not close(model, pair["copy"])
    # A copy that is copied alone follows the model of the original.
    alone = copy.deepcopy(pair["copy"])
    pair["model"][5].weight.detach().mul_(-1)
    assert close(pair["model"], alone)


def held():
    """A network that computes with a tensor in a dict, and with an attribute of a dict."""
    model = Made(lambda self, x: self.net(x) * (self.meta["factor"] + self.own.factor), net=conv())
    model.meta, model.own = {"factor": torch.ones(1)}, Attributed()
    model.own.factor = 1.0
    return model


def scaled():
    return Made(lambda self, x: self.net(x) * self.scale, net=conv(), scale=1.0)


def shift_folded(model):
    for value in (model.net[0].bias, model.net[1].weight, model.net[1].bias, model.net[1].running_mean):
        value.add_(0.5)


def sized(kind):
    return lambda: conv(nn.Linear(32, 32)).append(kind().sized())


#: Models, and changes of what they compute, which PyTorch does not count as writes to a weight of their own.
CHANGES = {
    "a hook": (conv, lambda model: model[5].register_forward_hook(lambda module, given, out: -out)),
    "a folded layer with two names": (TwoNames, shift_folded),
    "a tensor in a dict": (held, lambda model: model.meta["factor"].fill_(3.0)),
    "an attribute of a dict": (held, lambda model: setattr(model.own, "factor", 3.0)),
    "an attribute": (scaled, lambda model: setattr(model, "scale", 2.0)),
    "a mode of noise": (lambda: conv(nn.Linear(32, 32), WithMode()), lambda model: setattr(model[6], "factor", 3.0)),
    "a tensor of a defence": (lambda: Strong(conv()), lambda model: model.strength.fill_(5.0)),
    **{
        f"code of a user, {kind.__name__}": (sized(kind), lambda model: model[-1].weight.mul_(torch.arange(5.0)))
        for kind in (SizedInCopies, SizedInStates, SizedInModes, SizedByObject)
    },
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_changes_in_a_model_changes_in_its_copy(what):
    make, change = CHANGES[what]
    model = make().eval()
    fast = purify_fast.frozen_copy(model, X, dtype=F)
    before = fast(X)
    with torch.no_grad():
        change(model)
    fast.update()
    assert close(copy.deepcopy(model).eval(), fast) and not torch.allclose(fast(X), before, atol=1e-2)
