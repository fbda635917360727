"""A frozen copy: what it computes, how it follows its model, what it shares with it, and what it refuses."""

import copy
import pickle

import numpy as np
import pytest
import torch
from small_models import Made
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import purify_fast
from purify_fast.attacks import pgd
from purify_fast.models import SmallCNN
from purify_fast.speed.frozen_copy import FrozenCopy, _agree, _Answers

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (3, 8, 8)


class Own(Made):
    """As a user writes it: with the images as a named argument, which can be traced."""

    def forward(self, x):
        return self.how(self, x)


def net(width=8):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, 4))
    model(torch.rand(16, *SHAPE))
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("absent", [-10.0, -1e9])
def test_a_masked_class_does_not_hide_other_logits_of_a_copy(absent, dtype):
    logits = torch.cat([torch.randn(8, 9), torch.full((8, 1), absent)], 1)
    other = logits + torch.eye(10)[2] * 0.5
    want, got = (_Answers(one, torch.ones(8), torch.zeros(8), one) for one in (logits, other))
    assert _agree(want, want, dtype) and not _agree(got, want, dtype)


@pytest.fixture
def x():
    return torch.rand(16, *SHAPE, generator=torch.Generator().manual_seed(0))


def same(copied, model, x):
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, want = copied(leaf), model(other)
    ours, theirs = (torch.autograd.grad(out.square().sum(), one)[0] for out, one in ((got, leaf), (want, other)))
    return torch.allclose(got, want, atol=1e-5) and torch.allclose(ours, theirs, atol=1e-5)


def test_it_is_another_module_with_logits_and_gradient_of_the_model(x):
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast = purify_fast.frozen_copy(model, x)
    assert fast is not model and same(fast, model, x) and fast.folded == 1
    assert "Sequential in float32" in fast.about and "1 folded" in fast.about
    assert not any(one.requires_grad for one in fast.parameters())
    assert all(one.requires_grad for one in model.parameters()) and "forward" not in vars(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bfloat16_is_near_and_float32_comes_out(x):
    fast = purify_fast.frozen_copy(net(), x, dtype=torch.bfloat16)
    assert fast(x).dtype == torch.float32 and 0 < (fast(x) - net()(x)).abs().max() < 0.05


def test_a_new_tensor_in_the_memory_of_one_that_is_gone_is_seen(x):
    """Python gives its id, and the allocator its address, to another tensor; its count of writes is 0 too."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4, bias=False)).eval()
    fast = purify_fast.frozen_copy(model, x)
    for number in range(50):
        for _ in range(1 + number % 4):
            model[1].weight = None
            model[1].weight = nn.Parameter(torch.full((4, 192), float(number)), requires_grad=False)
        assert same(fast, model, x), number


OTHER_TENSORS = {
    "tied": lambda model: model.load_state_dict(model.state_dict() | {"b.weight": torch.randn(8, 8)}, assign=True),
    "bias": lambda model: setattr(model.fc, "bias", nn.Parameter(torch.ones(4))),
    "buffer": lambda model: setattr(model, "mask", torch.zeros(8)),
    "shape": lambda model: setattr(model, "fc", nn.Linear(8, 5, bias=False)),
    "gone": lambda model: setattr(model.a, "bias", None),
}


@pytest.mark.parametrize("change", OTHER_TENSORS)
def test_other_tensors_are_refused(x, change):
    def forward(self, x):
        h = self.b(self.a(self.body(x)).relu())
        return self.fc(h if self.mask is None else h * self.mask)

    body = nn.Sequential(nn.Flatten(), nn.Linear(192, 8))
    model = Own(forward, body=body, a=nn.Linear(8, 8), b=nn.Linear(8, 8), fc=nn.Linear(8, 4, bias=False)).eval()
    model.b.weight = model.a.weight
    model.register_buffer("mask", None)
    fast = purify_fast.frozen_copy(model, x)
    assert fast.classifier.b.weight is fast.classifier.a.weight
    OTHER_TENSORS[change](model)
    # A copy that could not read its model does not answer with what it read before.
    for call in (fast, fast, lambda images: pgd(fast, images, torch.arange(16) % 4, 0.1, steps=1), fast):
        with pytest.raises(ValueError, match=r"make a new one with purify_fast\.frozen_copy"):
            call(x)


class Noisy(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.body, self.kind, self.drop = net(), kind, nn.Dropout(0.5)
        self.own = {"torch's own": torch.Generator().manual_seed(0), "numpy's own": np.random.default_rng(0)}.get(kind)

    def forward(self, x):
        if self.kind == "torch's own":
            x = x + 0.1 * torch.randn(x.shape, generator=self.own)
        elif self.kind == "numpy's own":
            x = x + 0.1 * torch.from_numpy(self.own.standard_normal(x.shape)).float()
        elif self.kind == "numpy":
            x = x + 0.1 * torch.from_numpy(np.random.randn(*x.shape)).float()
        elif self.kind == "dark":
            x = x + 0.1 * torch.randn_like(x) if x.mean() < 0.4 else x
        return self.body(self.drop(x))


@pytest.mark.parametrize("kind", ["torch's own", "numpy's own", "numpy", "dark", "dropout"])
def test_a_random_model_answers_otherwise_each_time_and_never_like_its_copy(x, kind):
    model = Noisy(kind).eval()
    if kind == "dropout":
        model.drop.train()
    fast = purify_fast.frozen_copy(model, x)
    assert fast.classifier.drop.training == (kind == "dropout")
    with torch.no_grad():
        answers = {tuple(one(0.5 * x).flatten().tolist()) for _ in range(20) for one in (fast, model)}
    assert len(answers) == 40


def test_making_it_draws_no_numbers_of_the_caller(x):
    model = Noisy("torch's own").eval()
    state, own = torch.get_rng_state(), model.own.get_state()
    purify_fast.frozen_copy(model, x)
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(own, model.own.get_state())


@pytest.mark.parametrize("kind", ["dark", "size", "one image", "sliced", "reads the weight", "hook", "random path"])
def test_a_batchnorm_is_folded_only_where_nothing_else_can_read_the_layer(x, kind):
    def forward(self, x):
        h = self.body[0](x) if kind == "sliced" else self.first(x)
        if (kind == "dark" and x.mean() < 0.3) or (kind == "random path" and torch.rand(()) < 0.5):
            return self.fc(h.relu().mean((2, 3)))
        if (kind == "size" and h.shape[-1] > 8) or (kind == "one image" and len(x) == 1):
            h = F.leaky_relu(h, 0.1)
        h = self.body[1:](h) + h if kind == "sliced" else self.norm(h)
        extra = self.first.weight.sum() if kind == "reads the weight" else 0
        return self.fc(h.relu().mean((2, 3))) + extra

    first, norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
    if kind == "hook":
        first = nn.Sequential(first)
        first.register_forward_hook(lambda module, given, out: out.relu())
    nn.init.normal_(norm.bias)
    body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
    model = Own(forward, first=first, norm=norm, body=body, fc=nn.Linear(8, 4)).eval()
    fast = purify_fast.frozen_copy(model, x)
    others = {"dark": x * 0.4, "size": torch.rand(4, 3, 12, 12), "one image": x[:1]}
    assert fast.folded == 0
    torch.manual_seed(0)
    want = model(others.get(kind, x))
    torch.manual_seed(0)
    assert torch.allclose(fast(others.get(kind, x)), want, atol=1e-5)


def test_a_copy_that_differs_is_made_in_a_simpler_form(x):
    def forward(self, x):
        if self.fc.weight.dtype == torch.bfloat16:
            raise RuntimeError("no bfloat16 here")
        return self.fc(x.flatten(1)[:, ::2])

    model = Own(forward, fc=nn.Linear(96, 4)).eval()
    with pytest.warns(RuntimeWarning, match=r"no bfloat16 here .*test_frozen_copy.py, line .*in float32 instead"):
        fast = purify_fast.frozen_copy(model, x, dtype=torch.bfloat16)
    assert fast.dtype == torch.float32 and same(fast, model, x)


def test_train_changes_nothing_and_says_so_once(x, recwarn):
    fast = purify_fast.frozen_copy(net(), x)
    with pytest.warns(RuntimeWarning, match="train\\(\\) changes nothing"):
        assert fast.train() is fast
    recwarn.clear()
    fast.train(), fast.eval(), fast.train()
    assert not recwarn.list and not any(part.training for part in fast.modules())


def test_a_model_in_training_mode_has_a_copy_in_evaluation_mode(x):
    model = net().train()
    fast = purify_fast.frozen_copy(model, x)
    assert model.training and not fast.training and torch.allclose(fast(x), net()(x), atol=1e-5)


def test_it_runs_in_a_checkpoint_a_trace_and_an_export(x):
    fast = purify_fast.frozen_copy(net(), x)
    leaf = x.clone().requires_grad_()
    checkpoint(lambda images: fast(images.sigmoid()), leaf, use_reentrant=False).sum().backward()
    assert leaf.grad.norm() > 0 and torch.allclose(torch.jit.trace(fast, x)(x), fast(x), atol=1e-6)
    assert torch.allclose(torch.export.export(net(), (x,)).module()(x), fast(x), atol=1e-5)


def test_copies_in_memory_follow_and_pickles_keep_their_weights(x):
    model = net()
    fast = purify_fast.frozen_copy(model, x)
    twin, kept, before = copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), fast(x)
    with torch.no_grad():
        model[5].bias.add_(1.0)
    assert torch.equal(kept(x), before) and torch.allclose(twin(x), before + 1, atol=1e-5) and same(fast, model, x)
    del model
    assert torch.equal(fast(x), twin(x)) and isinstance(twin, FrozenCopy)


NOT_COPIED = [
    (lambda model, x: (torch.compile(model), x), r"give model\._orig_mod"),
    (lambda model, x: (torch.jit.trace(model, x), x), "eager mode"),
    (lambda model, x: (model, x.long()), r"x must be a batch of images .* got torch.int64"),
    (lambda model, x: (model, x, torch.float16), "dtype must be"),
    (lambda model, x: (model.append(nn.Linear(4, 4, device="meta")), x), r"on several devices .*, cpu, meta"),
]


@pytest.mark.parametrize(("change", "message"), NOT_COPIED)
def test_what_cannot_be_copied_is_refused_by_name(x, change, message):
    model, images, *dtype = change(net(), x)
    with pytest.raises((TypeError, ValueError), match=message):
        purify_fast.frozen_copy(model, images, **({"dtype": dtype[0]} if dtype else {}))


def test_attention_with_tokens_of_a_batch_first_is_the_same(x):
    def forward(self, x):
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        mixed, weights = self.attend(tokens, tokens, tokens)
        other, _ = self.attend(mixed, tokens[:, :5], tokens[:, :5], need_weights=False)
        return self.fc((mixed + other).mean(1)) + weights[:, 0, :4]

    parts = {"embed": nn.Conv2d(3, 8, 2, 2), "attend": nn.MultiheadAttention(8, 2, batch_first=True)}
    model = Own(forward, **parts, fc=nn.Linear(8, 4)).eval()
    fast = purify_fast.frozen_copy(model, x)
    assert not fast.classifier.attend.batch_first and model.attend.batch_first and same(fast, model, x)


def test_a_copy_is_compared_in_whole_float32_under_tf32():
    """PyTorch lets convolutions on a GPU round to TF32, and two right forms of a deep network then differ too much."""
    seen = set()

    class Network(SmallCNN):
        def forward(self, x):
            seen.add(torch.backends.cudnn.allow_tf32)
            return super().forward(x)

    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        fast = purify_fast.frozen_copy(Network(3, 10, (8, 8), 4).eval(), torch.rand(4, 3, 8, 8), dtype=torch.float32)
        assert seen == {False} and torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before
    # A race of cuDNN's algorithms would change the last bits when a step is captured.
    assert fast._followed.graphs.cudnn_benchmark == "off"
