"""`accelerate`: the copy follows its module, gradients are right in every mode, and odd modules run as they are."""

import copy
import gc
import logging
import pickle
import weakref

import pytest
import torch
from small_models import with_random_norms
from torch import nn
from torch.nn import functional as F

import purify_fast
from purify_fast import accelerate, images_only, restore
from purify_fast.attacks import pgd
from purify_fast.models.classifiers import SmallCNN
from purify_fast.speed import accelerate as module
from purify_fast.speed.accelerate import accelerated, plainly
from purify_fast.speed.folding.inference_copy import InferenceCopy

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (3, 8, 8)


class Net(nn.Module):
    """A network with BatchNorms and attributes of several kinds."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head, self.scale = nn.Linear(8, 5), 1.0
        self.shift, self.settings = torch.zeros(()), {"factors": [1.0]}

    def forward(self, x):
        return self.scale * self.settings["factors"][0] * self.head(self.body(x).mean((2, 3))) + self.shift


@pytest.fixture(autouse=True)
def the_copy_is_faster(monkeypatch):
    """Small networks are not faster as copies. So the time of the module itself is taken as long."""
    original = module._answers
    monkeypatch.setattr(
        module, "_answers", lambda f, x: (original(f, x)[0], 0.0 if isinstance(f, InferenceCopy) else 1e9)
    )


def net():
    torch.manual_seed(0)
    return with_random_norms(Net())


def images(count=4, seed=1):
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def gradient(model, x, y):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)[0]


def calls(model):
    """Count the calls of the module itself."""
    seen = []
    forward = type(model).forward
    accelerated(model).own = lambda x: seen.append(len(x)) or forward(model, x)
    return seen


def optimizer_step(model):
    loss = F.cross_entropy(model.train()(images(8)), torch.arange(8) % 5)
    weights = list(model.parameters())
    for weight, grad in zip(weights, torch.autograd.grad(loss, weights), strict=True):
        weight.grad = grad
    torch.optim.Adam(weights, 0.1).step()
    model.eval()


def averages(model):
    mean = torch.optim.swa_utils.AveragedModel(model)
    for weight in mean.parameters():
        weight.data.mul_(0.7)
    torch.optim.swa_utils.update_bn([images(8)], mean)
    model.load_state_dict(mean.module.state_dict())


CHANGES = {
    "an optimizer": optimizer_step,
    "load_state_dict": lambda model: model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()}),
    "averages": averages,
    "data, in place": lambda model: model.head.weight.data.mul_(-1),
    "data, one number": lambda model: model.head.bias.data[2].add_(1),
    "data, rows exchanged": lambda model: model.head.weight.data.copy_(model.head.weight.data.flip(0).clone()),
    "data, replaced": lambda model: setattr(model.head.weight, "data", torch.randn(5, 8)),
    "a new parameter": lambda model: setattr(model.head, "weight", nn.Parameter(torch.randn(5, 8))),
    "a buffer": lambda model: model.body[1].running_mean.add_(0.5),
    "a new layer": lambda model: setattr(model, "head", nn.Linear(8, 5)),
    "an attribute": lambda model: setattr(model, "scale", 3.0),
    "a tensor as attribute": lambda model: setattr(model, "shift", torch.ones(())),
    "a tensor as attribute, in place": lambda model: model.shift.fill_(2.0),
    "a list in a dictionary": lambda model: model.settings["factors"].__setitem__(0, 2.0),
    "a new activation": lambda model: model.body.__setitem__(2, nn.SiLU()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_copy_follows_every_change(change):
    model, x, y = accelerate(net()), images(), torch.arange(4)
    before = model(x).detach()
    assert accelerated(model).copy is not None
    CHANGES[change](model)
    plain = restore(copy.deepcopy(model)).eval()
    assert not torch.allclose(model(x.clone()), before, atol=1e-3)
    torch.testing.assert_close(model(x.clone()), plain(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient(model, x, y), gradient(plain, x, y), rtol=1e-3, atol=1e-6)
    assert accelerated(model).copy is not None


def test_the_module_is_otherwise_unchanged():
    plain, model = net(), accelerate(net())
    model(images())
    assert type(model) is Net and list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert all(weight.requires_grad for weight in model.parameters())
    seen = []
    handle = model.register_forward_hook(lambda *_: seen.append(1))
    model(images())
    assert seen == [1]
    handle.remove()
    # Hooks that change something do so once, whether they were there before the copy was made or not.
    for other in (model, accelerate(net())):
        handles = [
            other.register_forward_pre_hook(lambda _, given: (2 * given[0],)),
            other.register_forward_hook(lambda _, given, out: out / 2),
            other.register_full_backward_hook(lambda _, grads, __: (3 * grads[0],)),
        ]
        x, y = images(seed=5), torch.arange(4)
        hooked = restore(copy.deepcopy(other))
        torch.testing.assert_close(other(x), hooked(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient(other, x, y), gradient(hooked, x, y), rtol=1e-3, atol=1e-6)
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(other(x), plain(x), rtol=1e-4, atol=1e-5)
        assert accelerated(other).copy is not None
    inner = []
    model.body.register_forward_hook(lambda *_: inner.append(1))
    assert torch.equal(model(images(seed=3)), restore(copy.deepcopy(model))(images(seed=3))) and inner


def test_copies_and_pickles_follow_their_own_weights():
    model, x = accelerate(net()), images()
    model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert accelerated(other).model is other and torch.equal(other(x), model(x))
        with torch.no_grad():
            other.head.bias.add_(1)
        torch.testing.assert_close(other(x), model(x) + 1)
    assert "forward" not in vars(restore(model)) and accelerated(model) is None


def test_training_mode_is_the_module_itself():
    plain, model, x = net().train(), accelerate(net()), images()
    model(x)
    model.train()
    assert torch.equal(model(x), plain(x)) and torch.equal(model.body[1].running_mean, plain.body[1].running_mean)
    model.eval()
    # Batch statistics in one module suffice.
    model.body[1].train()
    plain.eval().body[1].train()
    assert torch.equal(model(x), plain(x))


def test_gradients_of_weights_are_right_in_evaluation_mode():
    """The copy has none, so the module itself is called again, with a warning. From then on it runs at once."""
    x, y = images(), torch.arange(4)
    for constant in (False, True):
        plain, model = net(), accelerate(net())
        found = []
        for one in (plain, model):
            leaf = x.clone().requires_grad_(not constant)
            one(leaf)
            loss = F.cross_entropy(one(leaf), y)
            if one is model:
                with pytest.warns(RuntimeWarning, match="gradients of the weights of Net in evaluation mode"):
                    loss.backward()
            else:
                loss.backward()
            found.append([weight.grad for weight in one.parameters()] + ([] if constant else [leaf.grad]))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        seen = calls(model)
        F.cross_entropy(model(x.clone().requires_grad_()), y).backward()
        assert seen == [4]


def test_second_derivatives_and_single_weights():
    plain, model, x = net(), accelerate(net()), images()
    found = []
    for one in (plain, model):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(one(leaf).exp().sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), [leaf, one.head.weight]))
    model = accelerate(net())
    with pytest.warns(RuntimeWarning):
        got = torch.autograd.grad(model(x.clone().requires_grad_()).exp().sum(), model.head.weight)
    want = torch.autograd.grad(plain(x).exp().sum(), plain.head.weight)
    for a, b in (*zip(*found, strict=True), (got[0], want[0])):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5)


def test_a_weight_that_changes_before_the_backward_is_an_error():
    model = accelerate(net())
    loss = model(images().requires_grad_()).sum()
    with torch.no_grad():
        model.head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_constant_batch_is_computed_once_and_released():
    model, x, y = accelerate(net()), images(), images(seed=2)
    model(x)
    seen = calls(model)
    first = model(x)
    for _ in range(3):
        point = y.clone().requires_grad_()
        torch.autograd.grad(F.kl_div(model(point).log_softmax(1), model(x).softmax(1), reduction="sum"), point)
    assert not seen and torch.equal(model(x), first)
    x.data.mul_(0.5)
    changed = model(x)
    assert seen == [4] and not torch.allclose(changed, first)
    with torch.no_grad():
        model.head.bias.add_(1)
        torch.testing.assert_close(model(x), changed + 1)
    watched = weakref.ref(x)
    # The graph of the first results has the batch too.
    del x, first, changed
    gc.collect()
    assert watched() is None and accelerated(model)._constant is None


class Noisy(Net):
    def forward(self, x):
        return super().forward(x + 1e-4 * torch.rand_like(x))


def test_a_random_model_draws_anew_in_each_call():
    model, x = accelerate(Noisy().eval()), images()
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))


class Sure(Net):
    """Its logits differ from each other by less than bfloat16 can tell."""

    def forward(self, x):
        return super().forward(x) + 1e4


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        (Sure, {"dtype": torch.bfloat16}, "its copy in torch.bfloat16 gives other logits or gradients"),
        (lambda: nn.Sequential(Net(), nn.Threshold(9, 0)), {}, None),
        (lambda: Wrapped(), {}, "TypeError"),
    ],
)
def test_an_odd_model_runs_itself_with_one_reason(model, options, reason, recwarn):
    made = model().eval()
    wanted = copy.deepcopy(made)
    accelerate(made, **options)
    for _ in range(2):
        got, want = made(images()), wanted(images())
        assert torch.equal(
            got["logits"] if isinstance(got, dict) else got, want["logits"] if isinstance(want, dict) else want
        )
    texts = [str(one.message) for one in recwarn if one.category is RuntimeWarning]
    assert len(texts) == (reason is not None) and all(reason in text for text in texts)


class Wrapped(Net):
    def forward(self, x):
        return {"logits": super().forward(x)}


def test_the_module_itself_runs_where_the_copy_does_not_apply():
    plain, model = net(), accelerate(net())
    model(images())
    seen = calls(model)
    model(images().double().float()[:, :, :5])
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images()).dtype == plain(images()).dtype
    torch.func.vmap(lambda x: model(x[None])[0])(images())
    with plainly(model):
        model(images())
    assert len(seen) >= 2
    assert torch.equal(torch.func.functional_call(model, dict(plain.named_parameters()), images()), plain(images()))
    assert torch.compile(model, backend="eager")(images()).shape == (4, 5)


def test_a_slow_copy_does_not_serve(monkeypatch):
    monkeypatch.undo()
    model = accelerate(net())
    original = module._answers
    monkeypatch.setattr(module, "_answers", lambda f, x: (original(f, x)[0], float(isinstance(f, InferenceCopy))))
    assert torch.equal(model(images()), net()(images())) and accelerated(model).copy is None


def test_bfloat16_only_where_it_is_fast(monkeypatch, caplog):
    monkeypatch.setattr(module, "FEWEST_WEIGHTS", 1)
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(module, "fast_bfloat16", lambda device, fast=fast: fast)
        monkeypatch.setattr("purify_fast.defences.base.fast_bfloat16", lambda device, fast=fast: fast)
        model = accelerate(net())
        with caplog.at_level(logging.INFO, logger="purify_fast"):
            model(images())
        assert accelerated(model).copy.dtype == dtype and f"Net in {dtype}" in caplog.text
        defence = purify_fast.Carso(SmallCNN(1, 10, (16, 16), 8), ["conv2"], (1, 16, 16), cond_dim=4, latent_dim=4)
        assert accelerate(defence).fast.dtype == dtype
        assert restore(defence).fast is None


def test_attacks_take_the_copy_and_judge_by_the_module():
    model, x, y = accelerate(net()), images(), torch.arange(4)
    model(x)
    seen = calls(model)
    found = pgd(model, x, y, eps=0.1, steps=3, keep_best=False)
    assert not seen
    wanted = pgd(net(), x, y, eps=0.1, steps=3, keep_best=False)
    assert ((found - wanted).abs() > 1e-5).float().mean() < 0.02
    assert all(weight.requires_grad for weight in model.parameters()) and not accelerated(model).off


def test_a_training_loop_with_pgd_follows_the_weights(monkeypatch):
    """Without `accelerate`, a direct call attacks a copy in bfloat16 that is made once."""
    monkeypatch.setattr("purify_fast.attacks.gradient_copy.FEWEST_WEIGHTS", 1)
    made = []
    original = InferenceCopy.__init__
    monkeypatch.setattr(InferenceCopy, "__init__", lambda self, *a, **b: made.append(1) or original(self, *a, **b))
    model, x, y = net(), images(), torch.arange(4)
    for _ in range(3):
        found = pgd(model, x, y, eps=0.1, steps=3, precision="bfloat16", seed=0)
        wanted = pgd(model, x, y, eps=0.1, steps=3, precision="float32", seed=0)
        assert ((found - wanted).abs() > 1e-2).float().mean() < 0.1
        CHANGES["an optimizer"](model)
    assert made == [1]


def test_images_only_restores_what_the_user_had():
    model = net().train()
    model.head.bias.requires_grad_(False)
    with pytest.raises(ZeroDivisionError), images_only(model):
        assert not any(weight.requires_grad for weight in model.parameters())
        leaf = images().requires_grad_()
        model(leaf).sum().backward()
        assert leaf.grad is not None and all(weight.grad is None for weight in model.parameters())
        raise ZeroDivisionError
    assert [name for name, weight in model.named_parameters() if not weight.requires_grad] == ["head.bias"]


def test_ddp_runs_the_accelerated_module(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        whole = accelerate(nn.parallel.DistributedDataParallel(net()))
        x, y = images(), torch.arange(4)
        assert accelerated(whole.module) is not None
        torch.testing.assert_close(gradient(whole.eval(), x, y), gradient(net(), x, y), rtol=1e-3, atol=1e-6)
        F.cross_entropy(whole.train()(x), y).backward()
        assert whole.module.head.weight.grad is not None and accelerated(restore(whole).module) is None
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (lambda x: x, {}, TypeError, "model must be a torch.nn.Module in eager mode, got function"),
        (torch.compile(nn.Identity(), backend="eager"), {}, TypeError, "model must not be compiled yet"),
        (nn.DataParallel(nn.Identity()), {}, TypeError, "got DataParallel"),
        (nn.Identity(), {"dtype": torch.float16}, ValueError, 'dtype must be "auto", torch.float32, torch.bfloat16'),
    ],
)
def test_wrong_arguments(model, options, error, message):
    with pytest.raises(error, match=message):
        accelerate(model, **options)
