"""Computes the distance between two flattened representations, u of a student and v of a frozen teacher.

    c = u . v / (|u| |v|)                 dd/du = dd/dc (v - (u . v / |u|^2) u) / (|u| |v|)
    abs_cosine    d = 1 - |c|             dd/dc = -sign(c)
    cosine        d = 1 - c               dd/dc = -1
    angular       d = arccos(c) / pi      dd/dc = -1 / (pi sqrt(max(1 - c^2, 1e-4)))
    l2            d = |u - v|             dd/du = (u - v) / d, 0 at u = v

``abs_cosine`` is ARREST's distance (arXiv 2308.16454), from Mao et al. (NeurIPS 2019). In this form, the gradient is
exactly 0 at u = v, where fine-tuning starts. The bound 1e-4 limits the infinite slope of arccos: below an angle of 0.57
degrees, the length of the gradient decreases linearly to 0. If |u| |v| < 1e-30, c and its gradient are 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .._tensors import check_floating, last_channels, per_image
from .dispatch.examples import ROWS, examples, normal
from .dispatch.gradient import SCALED_ROWS, cpu_kernel, define_backward, differentiable, needs_gradient, saves
from .dispatch.registry import define_op, wide

KINDS = ("abs_cosine", "cosine", "angular", "l2")
LEAST_NORMS = 1e-30
LEAST_SQUARE_SINE = 1e-4


def _measure(student: Tensor, teacher: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return (d, scale, along) of one layer, [B] each, with dd/du = scale (v - along u), so that c is 1 at u = v."""
    u = wide(student)
    v, dims = teacher.to(u.dtype), list(range(1, u.dim()))
    if kind == "l2":
        d = (u - v).square().sum(dims).double().sqrt()
        return d, torch.where(d > 0, -1 / d, 0 * d), torch.ones_like(d)
    dot, uu, vv = ((a * b).sum(dims).double() for a, b in ((u, v), (u, u), (v, v)))
    norms = (uu * vv).sqrt()
    # The comparison is False for NaN, so NaN propagates.
    nothing = norms < LEAST_NORMS
    # If squares overflowed, the quotient would be 0, so it is replaced by NaN.
    c = torch.where(norms < math.inf, dot / norms, math.nan)
    c = torch.where(nothing, 0.0, c.clamp(-1, 1))
    if kind == "abs_cosine":
        d, slope = (1 - c.abs()).clamp_min(0), -c.sign()
        # Replace the sign of NaN by NaN, because on some devices it is 0.
        slope = torch.where(c.isnan(), c, slope)
    elif kind == "cosine":
        d, slope = (1 - c).clamp_min(0), 0 * c - 1
    else:
        d = torch.arccos(c) / math.pi
        slope = -1 / (math.pi * (1 - c * c).clamp_min(LEAST_SQUARE_SINE).sqrt())
    return d, torch.where(nothing, 0.0, slope / norms), torch.where(nothing, 0.0, dot / uu)


def _result_dtype(layers: Sequence[Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, (x.dtype for x in layers), torch.float32)


def reference(student: list[Tensor], teacher: list[Tensor], kind: int) -> tuple[Tensor, Tensor]:
    """Map layers [B, ...] to distances [B, L] and slopes [B, L, 2]: (scale, along) in dd/du = scale (v - along u)."""
    measured = [_measure(u, v, KINDS[kind]) for u, v in zip(student, teacher, strict=True)]
    dtype = _result_dtype(student)
    slopes = torch.stack([torch.stack(rest, 1) for _, *rest in measured], 1).detach()
    return torch.stack([d for d, *_ in measured], 1).to(dtype), slopes.to(dtype)


def reference_backward(grad: Tensor, student: list[Tensor], teacher: list[Tensor], slopes: Tensor) -> list[Tensor]:
    """Return grad [B, L] times dd/dstudent. Each layer has its own dtype and shape."""
    out = []
    for layer, (x, v) in enumerate(zip(student, teacher, strict=True)):
        u = wide(x)
        scale, along = slopes[:, layer].unbind(1)
        weight = per_image((grad[:, layer] * scale).to(u.dtype), x)
        slope = v.to(u.dtype) - per_image(along.to(u.dtype), x) * u
        out.append((weight * slope).to(x.dtype).contiguous())
    return out


def _fake(student: Sequence[Tensor], teacher: Sequence[Tensor], kind: int) -> tuple[Tensor, Tensor]:
    batch, layers, dtype = student[0].shape[0], len(student), _result_dtype(student)
    return student[0].new_empty((batch, layers), dtype=dtype), student[0].new_empty((batch, layers, 2), dtype=dtype)


def _variant(layers: int) -> str:
    """Return the variant of a call: "several" for several layers, which take the kernel a single launch, or ""."""
    return "several" if layers > 1 else ""


#: The shapes of one, two and three layers. Layers of 9,001 numbers have more numbers than one program processes.
ONE, TWO, THREE = ((2, 5, 7),), ((9001,), (3,)), ((64, 8, 8), (130,), (4, 1025))
#: By kind and layers; for the values see `Example.gpu`.
EXAMPLES = {(kind, layers): "f" if layers == ONE else "" for kind in KINDS for layers in (ONE, THREE, TWO)} | {
    ("l2", ONE): "",
    ("abs_cosine", TWO): "h",
    ("abs_cosine", ((64, 8, 8),)): "",
    ("l2", TWO): "b",
}


VARIANT: dict[str, Any] = {"variant": lambda kind, layers: _variant(len(layers))}


def _arguments(
    kind: str, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, seed: int
) -> tuple[list[Tensor], list[Tensor], int]:
    teacher = [normal(seed + i, ROWS, *shape) for i, shape in enumerate(shapes)]
    student = [v + 0.5 * normal(seed + 100 + i, *v.shape) for i, v in enumerate(teacher)]
    return [u.to(dtype) for u in student], [v.to(dtype) for v in teacher], KINDS.index(kind)


OP = define_op(
    "representation_distance",
    "(Tensor[] student, Tensor[] teacher, int kind) -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    # Another order of the sums changes the cosine by a few ulp. In the examples, the distance is only about a tenth of
    # the cosine, so the same error is ten times as many ulp of the distance.
    examples=examples(_arguments, EXAMPLES, slack=lambda kind, _: 0.0 if kind == "l2" else 32.0, **VARIANT),
    # From benchmarks/results: kernels.csv of cpu and nvidia-h200, and cpu/ops.csv.
    in_graphs={"cuda": ("several",)},
    # The size is that of the first layer.
    size=lambda student, *_: student[0].numel(),
)
BACKWARD = define_backward(
    OP,
    "(Tensor grad, Tensor[] student, Tensor[] teacher, Tensor slopes) -> Tensor[]",
    reference=reference_backward,
    fake=lambda grad, student, teacher, slopes: [x.new_empty(x.shape) for x in student],
    saved=lambda inputs, outputs: (*inputs[:2], outputs[1]),
    constants=1,
    changes={"slack": 0.0},
    cuda={"": 2**20, "several": 0},
    in_graphs={},
    size=lambda grad, student, *_: student[0].numel(),
)


#: A CPU kernel that returns the distances of one layer [B], and dd/du in the student's shape and the dtype of the
#: arithmetic. For 16-bit layers, dd/du has as many bytes as the two layers, which the backward would otherwise read.
SAVING = cpu_kernel("representation_distance_keeping", "(Tensor student, Tensor teacher, int kind) -> (Tensor, Tensor)")


_with_saved = differentiable(SAVING, SCALED_ROWS, lambda inputs, outputs: (outputs[1], inputs[0].dtype), constants=1)


def _forward(kind: int, layers: int, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    plain = OP.uses_reference(tensors[0].device, tensors[0].numel(), _variant(layers))
    call = reference if plain else OP.handle
    return call(list(tensors[:layers]), list(tensors[layers:]), kind)


def _backward(grad: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
    *tensors, slopes, layers = saved
    return None, None, *BACKWARD(grad, tensors[:layers], tensors[layers:], slopes, variant=_variant(layers))


# This function also calls the reference. Autograd's own gradient of the reference would be rounding error at u = v, and
# NaN at 0.
_distance = differentiable(
    _forward, _backward, lambda inputs, outputs: (*inputs[2:], outputs[1], inputs[1]), constants=1
)


def _check(student: Sequence[Tensor], teacher: Sequence[Tensor], kind: str) -> None:
    """Raise ValueError if the layers do not match the documentation of `representation_distance`."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not student or len(student) != len(teacher):
        text = "student and teacher must have the same number of layers, and at least one layer, "
        raise ValueError(f"{text}got {len(student)} and {len(teacher)}")
    for u, v in zip(student, teacher, strict=True):
        if u.shape != v.shape or u.dim() < 2 or u.shape[0] != student[0].shape[0]:
            got = f"{list(u.shape)}, {list(v.shape)}"
            needs = "equal shapes [B, ...], and all layers the same B"
            raise ValueError(f"student and teacher must have {needs}, got {got}")
        check_floating(student=u, teacher=v, first=student[0])


def representation_distance(
    student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor], kind: str = "abs_cosine"
) -> Tensor:
    """Compute the distance between representations, one number per sample and layer.

    Args:
        student: layer ``[B, ...]``, or a sequence of layers, whose shapes and dtypes may differ; float16, bfloat16,
            float32 or float64. It gets a gradient.
        teacher: layer or layers with the same shapes and device, in any of these dtypes. It gets no gradient, even if
            it requires one.
        kind: ``abs_cosine`` (0 for parallel and antiparallel vectors, 1 for orthogonal vectors), ``cosine`` (0 to 2),
            ``angular`` (0 to 1, in half turns) or ``l2`` (Euclidean, in the features' unit).

    Returns:
        ``[B]`` for one tensor, ``[B, L]`` for L layers, never negative; float32 (float64 if a layer of the student is),
        also under autocast. At u = v the distance is 0 with gradient 0. The distance of a zero vector from every vector
        is 1 (``angular``: 0.5), with gradient 0.

    Raises:
        ValueError: shapes, dtypes, devices or numbers of layers do not match, or the kind is unknown.

    NaN, infinity or norms above 1.8e19 in float32 give NaN (for ``l2``, infinity gives infinity). Below norms of 1e-15
    the result is inaccurate. Near 0 and 1, ``angular`` has an error of up to 2e-4. Every memory format is supported:
    the gradient has the student's format. The op has first-order gradients only and is deterministic. It does not
    support ``vmap``.
    """
    single = isinstance(student, Tensor)
    if single != isinstance(teacher, Tensor):
        raise ValueError("student and teacher must both be tensors, or both sequences of tensors")
    us = [student] if isinstance(student, Tensor) else list(student)
    vs = [teacher] if isinstance(teacher, Tensor) else list(teacher)
    _check(us, vs, kind)
    for layer, (u, v) in enumerate(zip(us, vs, strict=True)):
        # The op gets contiguous rows, for every memory layout.
        if last_channels(u):
            us[layer], vs[layer] = u.permute(0, 2, 3, 1), v.permute(0, 2, 3, 1)
    gradient = needs_gradient(*us)
    kernel = not OP.uses_reference(us[0].device, us[0].numel())
    if gradient and single and kernel and saves(BACKWARD, us[0]):
        return _with_saved(us[0], vs[0].detach(), KINDS.index(kind))[0]
    tensors = (*us, *(v.detach() for v in vs))
    # torch.compile rejects an autograd.Function with a variable number of tensors if none needs a gradient.
    call = _distance if gradient else _forward
    distance, _ = call(KINDS.index(kind), len(us), *tensors)
    return distance.squeeze(1) if single else distance
