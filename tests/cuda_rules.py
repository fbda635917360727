"""Refuses on a CPU what PyTorch refuses on CUDA, so that a test without a GPU finds it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib import import_module
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from purify_fast.ops import REGISTRY

HALVES = (torch.bfloat16, torch.float16)
WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
#: Operators of which CPUs accept mixed dtypes and CUDA does not: as many of their arguments must have one dtype. CPUs
#: too refuse mixed dtypes in other convolutions, in products, and in index_put, scatter and index_add.
ONE_DTYPE = {
    # aten/src/ATen/native/cuda/group_norm_kernel.cu reads all tensors in the dtype of the images. So does
    # layer_norm_kernel.cu, but for two tensors of its backward (github.com/pytorch/pytorch/issues/135969).
    "native_group_norm": 3,
    "native_group_norm_backward": 5,
    "native_layer_norm": 4,
    # The bias of a transposed convolution: aten/src/ATen/native/Convolution.cpp, check_input_same_type_as_parameters.
    "convolution": 3,
    "_convolution": 3,
}
#: The dtypes that CUDA's operators do not have, although CPUs have them: the difference between ``dtypes`` and
#: ``dtypesIfCUDA`` in torch/testing/_internal/common_methods_invocations.py. Both have bfloat16 products.
MISSING = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot", "addmm", "addbmm", "baddbmm", "addmv", "linear"), WHOLE),
    **dict.fromkeys(("convolution", "_convolution", "avg_pool2d", "avg_pool3d", "max_pool2d_with_indices"), WHOLE),
    **dict.fromkeys(("max_pool3d_with_indices", "upsample_bilinear2d", "upsample_bicubic2d"), WHOLE),
    **dict.fromkeys(("histc", "igamma", "igammac"), HALVES),
}
#: Operators that raise on CUDA where `torch.use_deterministic_algorithms` is in force: its documentation, and the
#: calls of alertNotDeterministic in aten/src/ATen/native/cuda.
NOT_DETERMINISTIC = (
    *("avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward"),
    *("adaptive_max_pool2d_backward", "fractional_max_pool2d_backward", "fractional_max_pool3d_backward"),
    *("max_pool3d_with_indices_backward", "max_unpool2d", "max_unpool3d", "grid_sampler_2d_backward"),
    *("grid_sampler_3d_backward", "upsample_linear1d_backward", "upsample_bilinear2d_backward"),
    *("upsample_bicubic2d_backward", "upsample_trilinear3d_backward", "reflection_pad1d_backward"),
    *("reflection_pad2d_backward", "reflection_pad3d_backward", "nll_loss2d_forward", "_ctc_loss_backward"),
    *("put_", "histc", "median", "nanmedian", "_embedding_bag_backward"),
)
#: Parts of the names of operators that CPUs have in place of CUDA's, under functions that both have.
OF_CPUS = ("mkldnn", "for_cpu", "slow_conv")
#: What autocast computes in float32 on CUDA, by the table "CUDA Ops that can autocast to float32" in PyTorch's
#: documentation of torch.amp. On CPUs it leaves most of them alone, so that their results have another dtype there.
IN_FLOAT32 = (
    *("__pow__", "__rdiv__", "__rpow__", "__rtruediv__", "acos", "asin", "binary_cross_entropy_with_logits"),
    *("cdist", "cosh", "cosine_embedding_loss", "cosine_similarity", "cross_entropy", "cumprod", "cumsum", "dist"),
    *("erfinv", "exp", "expm1", "group_norm", "hinge_embedding_loss", "kl_div", "l1_loss", "layer_norm", "log"),
    *("log10", "log1p", "log2", "log_softmax", "margin_ranking_loss", "mse_loss", "multi_margin_loss"),
    *("multilabel_margin_loss", "nll_loss", "norm", "normalize", "pdist", "poisson_nll_loss", "pow", "prod"),
    *("reciprocal", "renorm", "rsqrt", "sinh", "smooth_l1_loss", "soft_margin_loss", "softmax", "softmin"),
    *("softplus", "sum", "tan", "triplet_margin_loss"),
)


class RefusedOnCUDA(RuntimeError):
    """An operator that a CPU computes would raise an error on CUDA."""


def _dtypes(arguments: tuple) -> set[torch.dtype]:
    return {leaf.dtype for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.is_floating_point()}


def refusal(operator: str, overload: str, arguments: tuple) -> str | None:
    """Return why CUDA refuses a call of an operator of ATen; None if it does not."""
    mixed = _dtypes(arguments[: ONE_DTYPE.get(operator, 0)])
    if len(mixed) > 1:
        return f"mixed dtypes, {', '.join(sorted(map(str, mixed)))}"
    if operator.startswith(("native_batch_norm", "_native_batch_norm", "_batch_norm_with_update", "cudnn_batch_norm")):
        # aten/src/ATen/native/cuda/Normalization.cu: numbers of channels have the dtype of the images, or float32.
        images, channels = arguments[0].dtype, _dtypes(arguments[1:5])
        if channels - {images, torch.float32} or (images == torch.float64 and channels - {images}):
            return f"images in {images}, and numbers of channels in {', '.join(sorted(map(str, channels)))}"
    first = next((leaf.dtype for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)), None)
    if first in MISSING.get(operator, ()):
        return f"no {first}"
    if torch.are_deterministic_algorithms_enabled():
        weights = operator == "bincount" and len(arguments) > 1 and arguments[1] is not None
        product = operator.startswith("scatter_reduce") and "prod" in arguments
        if weights or product or (operator in NOT_DETERMINISTIC and (operator != "median" or overload != "default")):
            return "no deterministic algorithm"
    known = torch.version.cuda is None or any(part in operator for part in OF_CPUS)
    name = f"aten::{operator}.{overload}".removesuffix(".default")
    if not known and not torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, "CUDA"):
        return "no kernel"
    return None


class _Operators(TorchDispatchMode):
    """Refuses operators of ATen, and computes the package's own by their definitions, so that these are seen too."""

    def __init__(self, refused: Callable[[str], None]):
        super().__init__()
        self.refused = refused

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        space, _, operator = function._schema.name.partition("::")
        if space == "purify_fast" and operator in REGISTRY:
            with self:
                return REGISTRY[operator].reference(*args, **(kwargs or {}))
        reason = refusal(operator, function._overloadname, args) if space == "aten" else None
        if reason is not None:
            self.refused(f"{operator}: {reason}")
        return function(*args, **(kwargs or {}))


class _Autocast(TorchFunctionMode):
    """Autocasts on a CPU as on CUDA."""

    def __init__(self, refused: Callable[[str], None]):
        super().__init__()
        self.refused = refused

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if not torch.is_autocast_enabled("cpu"):
            return function(*args, **kwargs)
        if name in ("binary_cross_entropy", "bce_loss"):
            self.refused(f"{name}: autocast refuses it")
        if name not in IN_FLOAT32 or kwargs.get("dtype") is not None:
            return function(*args, **kwargs)

        def widened(tensor: Tensor) -> Tensor:
            return tensor.float() if tensor.dtype in HALVES else tensor

        args, kwargs = tree_map_only(Tensor, widened, (args, kwargs))
        with torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)


@contextlib.contextmanager
def cuda_rules() -> Iterator[None]:
    """Within the block, raise `RefusedOnCUDA` for what PyTorch computes on a CPU and refuses on CUDA."""

    def refused(message: str) -> None:
        raise RefusedOnCUDA(message)

    # The package asks for a device's type before it normalizes images of 16 bits with weights in float32.
    no_device = mock.patch.object(import_module("purify_fast.models.unet"), "MIXED_DTYPES", ())
    with no_device, _Autocast(refused), _Operators(refused):
        yield
