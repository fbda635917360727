"""Combines the logits l [B, K, C] of K samples into one prediction, in the log domain.

    lse             q_i = logsumexp_k l_ki
    peel            log P_i = S_i - logsumexp_j S_j,   S = exp(q), continued above q = 70 along its tangent
    mean            mean_k l_ki
    mean_sigmoid    logit(mean_k sigmoid(l_ki))
    vote            the number of samples whose largest logit is l_ki
    peel_reference  logit(softmax_i(sum_k exp(l_ki)))

``lse`` predicts the same class as ``peel``, and is always finite. ``peel`` is the logarithm of CARSO's P (arXiv
2306.06081, section 4.5). The last formula is that of CARSO's code, for study only. It is often infinite (with K = 8 and
all other logits 0, above a top logit of 1.2), with NaN gradients, so an attack on it gives a meaningless result.
``mean_sigmoid`` is "prob" there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._tensors import check_floating
from .dispatch.examples import ROWS, examples, normal
from .dispatch.gradient import cpu_kernel, define_backward, differentiable, needs_gradient, saves
from .dispatch.registry import define_op, wide

#: The methods that have a kernel. The kernels identify them by index.
METHODS = ("lse", "peel", "mean", "mean_sigmoid", "vote")
#: exp(70) = 2.5e30, so float32 has eight decades above it for the tangent and for sums over classes.
TANGENT = 70.0


def _tangent_exp(q: Tensor) -> tuple[Tensor, Tensor]:
    """Return exp(q), continued linearly above TANGENT, and its derivative."""
    # torch.clamp is not used, because its gradient at TANGENT itself differs between versions of torch.
    above = q > TANGENT
    slope = torch.exp(torch.where(above, TANGENT, q))
    return torch.where(above, slope * (1 + (q - TANGENT)), slope), slope


def reference(logits: Tensor, method: int) -> Tensor:
    """Compute the op in plain PyTorch: map logits [B, K, C] to [B, C], in float32 (float64 for float64)."""
    x = wide(logits)
    name = METHODS[method]
    if name == "lse":
        return torch.logsumexp(x, 1)
    if name == "peel":
        return F.log_softmax(_tangent_exp(torch.logsumexp(x, 1))[0], 1)
    if name == "mean":
        return x.mean(1)
    if name == "mean_sigmoid":
        return torch.logsumexp(F.logsigmoid(x), 1) - torch.logsumexp(F.logsigmoid(-x), 1)
    return F.one_hot(x.detach().argmax(2), x.shape[2]).sum(1).to(x.dtype)


def reference_backward(grad: Tensor, logits: Tensor, method: int) -> Tensor:
    """Return the gradient of the logits, [B, K, C] in their dtype, from the gradient of the result, [B, C]."""
    x, g = wide(logits), wide(grad)
    name = METHODS[method]
    if name in ("lse", "peel"):
        if name == "peel":
            s, slope = _tangent_exp(torch.logsumexp(x, 1))
            g = (g - torch.softmax(s, 1) * g.sum(1, keepdim=True)) * slope
        top = x.amax(1, keepdim=True)
        # Beside +inf the gradient of logsumexp is 0, where softmax would give NaN.
        out = torch.where(top == torch.inf, (x - top).exp(), torch.softmax(x, 1)) * g[:, None]
    elif name == "mean":
        out = (g / x.shape[1])[:, None].expand_as(x)
    elif name == "mean_sigmoid":
        yes, no = F.logsigmoid(x), F.logsigmoid(-x)
        out = g[:, None] * (torch.softmax(yes, 1) * no.exp() + torch.softmax(no, 1) * yes.exp())
    else:
        out = torch.zeros_like(x)
    return out.to(logits.dtype).contiguous()


def peel_reference(logits: Tensor) -> Tensor:
    """Compute ``peel`` as CARSO's code does, [B, K, C] to [B, C]. It can be infinite, and then has no gradient."""
    p = torch.softmax(torch.exp(wide(logits)).sum(1), 1)
    return torch.log(p / (1 - p))


#: By method, shape, and standard deviation of the logits; for the values see `Example.gpu`. Some shapes have few
#: classes, and the others more than a vector has lanes. In the last example, peel uses the tangent, whose slope exp(70)
#: is infinite in float16.
EXAMPLES = {
    ("lse", (ROWS, 8, 10), 3.0): "f",
    ("peel", (ROWS, 8, 10), 3.0): "fb",
    ("mean", (ROWS, 8, 10), 3.0): "b",
    ("mean_sigmoid", (ROWS, 8, 10), 3.0): "f",
    ("vote", (ROWS, 8, 10), 3.0): "fh",
    **{(method, (ROWS, 5, classes), 3.0): "" for method in ("lse", "mean") for classes in (37, 101)},
    ("peel", (ROWS, 64, 7), 3.0): "",
    ("peel", (ROWS, 8, 12), 60.0): "fb",
}
PROPERTIES: dict[str, Any] = {
    "dtypes": lambda method, shape, scale: (torch.float32, torch.bfloat16, torch.float16)[: 2 if scale > 3 else 3],
    "exact": lambda method, *_: method == "vote",
    # The exponentials and divisions of a GPU round differently than those of a CPU.
    "slack": lambda method, *_: 0.0 if method == "vote" else 16.0,
    "variant": lambda method, *_: method,
}


def _arguments(method: str, shape: tuple[int, ...], scale: float, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    return normal(seed, *shape, scale=scale).to(dtype), METHODS.index(method)


OP = define_op(
    "aggregate",
    "(Tensor logits, int method) -> Tensor",
    reference=reference,
    fake=lambda logits, method: wide(logits).new_empty((logits.shape[0], logits.shape[2])),
    examples=examples(_arguments, EXAMPLES, **PROPERTIES),
    # From benchmarks/results: kernels.csv of cpu and nvidia-h200, and cpu/ops.csv. PyTorch computes the mean by a few
    # launches.
    cuda=dict.fromkeys(METHODS, 0) | {"mean": None},
)
BACKWARD = define_backward(
    OP,
    "(Tensor grad, Tensor logits, int method) -> Tensor",
    reference=reference_backward,
    cuda=OP.smallest["cuda"] | {"lse": 2**20},
)


#: CPU kernels for ``lse`` and ``peel`` with at least SAVED_FROM classes. SAVING also returns three numbers for each
#: image and class, [B, 3, C], with which FROM_SAVED, the backward, reads the logits only once.
SAVING = cpu_kernel("aggregate_keeping", "(Tensor logits, int method) -> (Tensor, Tensor)")
FROM_SAVED = cpu_kernel("aggregate_from_kept", "(Tensor grad, Tensor logits, Tensor saved, int method) -> Tensor")
SAVED_FROM = 16


_with_saved = differentiable(
    SAVING, FROM_SAVED, lambda inputs, outputs: (inputs[0], outputs[1], inputs[1]), constants=1
)
# Vote also uses this around the reference, for the gradient 0: autograd has none.
_aggregate = differentiable(
    lambda logits, method: OP(logits, method, variant=METHODS[method]),
    lambda grad, logits, method: BACKWARD(grad, logits, method, variant=METHODS[method]),
)


def aggregate(logits: Tensor, method: str = "lse") -> Tensor:
    """Combine the logits of K samples into one prediction per image.

    Args:
        logits: ``[B, K, C]``, K >= 1, C >= 2; float16, bfloat16, float32 or float64.
        method: ``lse``, ``peel`` (log-probabilities), ``mean``, ``mean_sigmoid`` or ``vote``, which has gradient 0:
            attack ``lse`` in its place. ``peel_reference`` is CARSO's published form, on which attacks give
            meaningless results.

    Returns:
        ``[B, C]``, float32 (float64 for float64 inputs), also under autocast. Finite for logits up to 1e8, except for
        the published form. ``lse``, ``peel`` and ``peel_reference`` (where finite) have the same argmax.

    Raises:
        ValueError: a shape, a dtype or the method is wrong.

    The op has first-order gradients only and is deterministic. The kernels do not support ``vmap``.
    """
    check_floating(logits=logits)
    if logits.dim() != 3 or logits.shape[1] < 1 or logits.shape[2] < 2:
        raise ValueError(f"logits must be [B, K, C], with K >= 1 and C >= 2 classes, got {list(logits.shape)}")
    if method == "peel_reference":
        return peel_reference(logits)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, peel_reference, got {method!r}")
    index = METHODS.index(method)
    differentiated = needs_gradient(logits)
    if OP.uses_reference(logits.device, logits.numel(), method) and not (method == "vote" and differentiated):
        return reference(logits, index)
    few = method not in ("lse", "peel") or logits.shape[2] < SAVED_FROM
    if differentiated and not few and saves(BACKWARD, logits, method):
        return _with_saved(logits, index)[0]
    return (_aggregate if differentiated else OP.handle)(logits, index)
