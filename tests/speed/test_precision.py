"""The precision of float32 on a GPU, and the choice of bfloat16. The settings can be read without a GPU."""

import time

import pytest
import torch
from torch import nn
from torch._C import _len_torch_function_stack
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import purify_fast
from purify_fast.evaluation import evaluate
from purify_fast.judge.results.cache import RowCache
from purify_fast.models.unet import UNet
from purify_fast.speed import precision as processor
from purify_fast.speed.agreement import BFLOAT16
from purify_fast.speed.frozen_copy import auto_dtype
from purify_fast.speed.layout import autocast_to
from purify_fast.speed.precision import PER_VALUE, PRODUCTS, float32_products, is_dense, whole_float32_by_default
from purify_fast.training import FitConfig, TrainingAttack, fit
from purify_fast.training.classifier import ClassifierConfig, ClassifierTask


def settings() -> tuple[bool, bool]:
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision() != "highest"


@pytest.mark.parametrize("products", ["highest", "high", "medium"])
def test_products_are_ieee_unless_tf32_is_asked_for_and_the_settings_are_restored(products):
    own = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(products)
        before = settings()
        with float32_products():
            assert settings() == (False, False)
            with float32_products(tf32=True):
                assert settings() == (True, True)
            assert settings() == (False, False)
        assert settings() == before and torch.get_float32_matmul_precision() == products
    finally:
        torch.set_float32_matmul_precision(own)


def test_settings_made_by_the_newer_names_are_restored():
    setting = torch.backends.cudnn.conv
    before = setting.fp32_precision
    try:
        setting.fp32_precision = "ieee"
        with float32_products(tf32=True):
            assert settings() == (True, True)
        assert setting.fp32_precision == "ieee"
    finally:
        setting.fp32_precision = before


def test_training_and_evaluation_use_whole_float32_unless_the_caller_chose():
    before = settings()
    found = whole_float32_by_default()(settings)
    assert found() == (False, False)
    with float32_products(tf32=True):
        assert found() == (True, True)
    assert settings() == before
    assert fit.__wrapped__ and evaluate.__wrapped__  # both are decorated with it


#: Stride, kernel, padding and side of the images: the outputs have a single column.
COLUMNS = [
    (3, 2, 1, 2),
    (3, 3, 1, 2),
    (4, 3, 1, 2),
    (4, 4, 0, 4),
    (3, 3, 0, 3),
    (2, 2, 0, 2),
    (2, 3, 1, 2),
    (1, 2, 0, 2),
]


@pytest.mark.parametrize(("stride", "kernel", "padding", "side"), COLUMNS)
def test_convolutions_with_a_single_column_are_right_in_bfloat16_on_a_cpu(stride, kernel, padding, side):
    """PyTorch 163347, 169688: oneDNN computes outputs, or gradients of the weights, from memory that nobody wrote."""
    for channels, outputs, layout in ((1, 1, 0), (3, 8, 0), (3, 64, 1), (16, 16, 0), (16, 16, 1), (64, 64, 1)):
        layer = nn.Conv2d(channels, outputs, kernel, stride, padding)
        # The numbers are numbers in bfloat16, so that only the products are rounded.
        layer.load_state_dict({name: one.bfloat16().float() for name, one in layer.state_dict().items()})
        x = torch.randn(8, channels, side, side).bfloat16().float()
        x = x.contiguous(memory_format=torch.channels_last) if layout else x
        toward, results = torch.randint(1, 9, (8, outputs, 1, 1)) / 8, []
        for dtype in (torch.float32, torch.bfloat16):
            leaf = x.clone().requires_grad_()
            with autocast_to(leaf.device, dtype):
                out = layer(leaf)
            assert out.dtype == dtype and out.shape[-1] == 1
            gradients = torch.autograd.grad((out.float() * toward).sum(), [leaf, *layer.parameters()])
            results.append((out.detach(), *gradients))
        for want, got in zip(*results, strict=True):
            torch.testing.assert_close(got.float(), want, rtol=BFLOAT16, atol=BFLOAT16 * float(want.abs().max()))


@pytest.mark.parametrize("network", [UNet(1, 16, patch=2), UNet(3, 8, attention=False)])
def test_convolutions_are_not_looked_at_in_networks_without_strides(network):
    """The functions of such a network call no convolution with a stride either."""
    strides = []

    class Record(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.conv2d:
                strides.append((*args[3:4], (kwargs or {}).get("stride", 1))[0])
            return function(*args, **(kwargs or {}))

    x, t = torch.rand(1, network.channels, 8, 8), torch.tensor(3.0)
    with torch.no_grad(), Record():
        network(x, t)
    assert strides and set(strides) <= {1, (1, 1)} and not network.has_strides
    for part, modes in ((network, 0), (nn.Sequential(network), 1), (None, 1)):
        with autocast_to(x.device, torch.bfloat16, part):
            assert _len_torch_function_stack() == modes
    network.down1 = nn.Conv2d(8, 8, 2, 2)
    assert network.has_strides


def test_a_training_in_bfloat16_has_the_gradients_of_float32_where_products_would_be_wrong():
    layers = nn.Conv2d(16, 16, 2, stride=3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 10)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, stride=3, padding=1), nn.ReLU(), *layers)
    attack = TrainingAttack(eps=0.0, steps=1)
    x, gradients = torch.randint(256, (16, 3, 6, 6), dtype=torch.uint8), []
    for precision in ("float32", "bfloat16"):
        task = ClassifierTask(model, ClassifierConfig(precision=precision, attack=attack, learning_rate=1e-9))
        fit(task, x, torch.arange(16) % 10, FitConfig(epochs=1, batch_size=16), progress=False)
        gradients.append([one.grad.clone() for one in model.parameters()])
    for want, got in zip(*gradients, strict=True):
        assert F.cosine_similarity(got.flatten(), want.flatten(), 0) > 0.9


class OfItself(nn.Module):
    """Multiplies images by themselves, so that the gradient of the images needs the images."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head((x[:, 0] @ x[:, 1]).mean(1))


@pytest.mark.slow
def test_a_compiled_copy_needs_no_images_that_the_caller_overwrites():
    """PyTorch 197887: a graph of Inductor that saves a view of an input does not notice that the input was written."""
    model, x = OfItself().eval(), torch.rand(4, 3, 8, 8)
    copy = purify_fast.frozen_copy(model, x, dtype=torch.float32, compile=True)
    want = torch.autograd.grad(copy(leaf := x.clone().requires_grad_()).square().sum(), leaf)[0]
    out = copy(leaf)
    with torch.no_grad():
        leaf.mul_(3)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), leaf)[0], want)


def dilated_or_grouped(dilation, groups, channels=128):
    layers = [nn.Conv2d(3, channels, 3, padding=1)]
    for _ in range(3):
        layers += [nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, groups=groups), nn.ReLU()]
        layers += [nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)).eval()


@pytest.mark.slow
@pytest.mark.parametrize(("dilation", "groups"), [(2, 1), (4, 1), (1, 32), (2, 32), (1, 128)])
def test_auto_takes_no_slower_dtype_for_dilated_and_grouped_convolutions(dilation, groups, one_thread):
    """PyTorch 183815: some of them became many times slower in bfloat16. Seconds of this thread, the least of five."""
    model, x = dilated_or_grouped(dilation, groups), torch.rand(8, 3, 16, 16)
    copies = [purify_fast.frozen_copy(model, x, dtype=dtype) for dtype in (torch.float32, auto_dtype(model, x))]

    def seconds(copy):
        began = time.thread_time()
        for _ in range(3):
            torch.autograd.grad(copy(leaf := x.clone().requires_grad_()).sum(), leaf)
        return time.thread_time() - began

    for copy in copies:
        seconds(copy)
    exact, auto = (min(times) for times in zip(*[map(seconds, copies) for _ in range(5)], strict=True))
    assert auto <= exact / 0.97 or copies[1].dtype == torch.float32, (auto, exact)


# -- the processor's instructions --------------------------------------------------------------------------------------
# The processor's instructions tell whether bfloat16 is fast: every process has the same answer.

CPU = torch.device("cpu")
EPYC, XEON = "AMD EPYC 9654", "Intel(R) Xeon(R) Platinum 8380H"


PROCESSORS = [
    (EPYC, True, False, {}, True),
    (EPYC, False, False, {}, False),
    (XEON, True, True, {}, True),
    (XEON, True, False, {}, False),
    (XEON, True, True, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, False),
    (EPYC, True, False, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, True),
    (EPYC, True, False, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, False),
    (EPYC, True, False, {"ATEN_CPU_CAPABILITY": "avx2"}, False),
]


@pytest.mark.parametrize(("name", "bf16", "tiles", "variables", "fast"), PROCESSORS)
def test_tiles_or_a_processor_of_amd_make_bfloat16_fast(monkeypatch, name, bf16, tiles, variables, fast):
    for variable in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(processor, "processor", lambda: name)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    assert processor.fast_bfloat16(CPU) == fast


def test_rows_of_another_answer_are_not_used(monkeypatch, tmp_path):
    def key(fast):
        monkeypatch.setattr("purify_fast.judge.results.cache.fast_bfloat16", lambda device: fast)
        return RowCache(tmp_path / "rows").key({"seed": 0}, None)

    assert key(True) == key(True) != key(False)


# -- dense products ----------------------------------------------------------------------------------------------------
# The dense products of a model decide whether a CPU computes its copy in bfloat16.


def test_dense_products_of_the_batch_and_per_computed_value_decide_but_not_the_number_of_weights():
    # One image of 8 x 8 has 4.7 million products and 6 thousand computed values. The model has 300 thousand weights.
    dense = nn.Sequential(nn.Conv2d(3, 128, 3, 2, 1), nn.Conv2d(128, 256, 3, 1, 1))
    products, values, weights = 16 * 256 * 128 * 9, 16 * (128 + 256), 256 * 128 * 9
    assert products / (values + weights) < PER_VALUE < products / values
    fewest = int(PRODUCTS // products) + 1
    assert is_dense(dense, torch.rand(fewest, 3, 8, 8)) and not is_dense(dense, torch.rand(fewest - 1, 3, 8, 8))
    in_groups = nn.Sequential(nn.Conv2d(3, 128, 3, 2, 1), nn.Conv2d(128, 256, 3, 1, 1, groups=64))
    assert not is_dense(in_groups, torch.rand(5000, 3, 8, 8))


def test_a_model_that_fails_is_not_dense():
    assert not is_dense(nn.Linear(5, 5), torch.rand(4, 3, 8, 8))
