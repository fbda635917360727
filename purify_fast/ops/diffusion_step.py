"""Computes the next state of a diffusion sampler from the state, the network's prediction and noise, in one pass.

    x0  = clip(P x + Q m, -c, c)
    out = A x0 + B x + s z,   z ~ N(0, 1) from the Philox stream DIFFUSION

x is the state, and m the network's prediction. A solver is defined by its eight numbers (P, Q, c, A, B, s, lo, hi);
`purify_fast.methods.diffusion.process` has them. c = inf means no clipping. The forward process alpha x + sigma z has B
= alpha, s = sigma, and P, Q and A are 0; x is then also passed as the prediction.

With learned variances (Nichol & Dhariwal, ICML 2021, arXiv 2102.09672), the prediction has twice as many channels as x:
m, and v, which interpolates between the logarithms lo and hi of two variances. s is 1 or 0 (no noise, even if v is
NaN):

    out = A x0 + B x + s d z,   d = exp(((1 + v) / 2 hi + (1 - v) / 2 lo) / 2)

The noise depends on the row's sample id and the index 2^16 draw + step. The backward draws z again. Let g be the
gradient of out, and g0 = A g where -c <= P x + Q m <= c, and 0 elsewhere. Then

    dx = P g0 + B g,   dm = Q g0,   dv = g s d z (hi - lo) / 4
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._settings import without_autocast
from .._tensors import check_floating, check_form, last_channels, memory_format, per_image
from .dispatch.examples import ROWS, examples, laid_out, normal, stream, wide_dtype
from .dispatch.gradient import define_backward, differentiable, needs_gradient
from .dispatch.registry import define_op
from .philox import DISTRIBUTIONS, Stream, default_stream, drawn

#: The names of the coefficients in order. In the formulas they are P, Q, c, A, B, s, lo and hi.
COEFFICIENTS = ("of_state", "of_prediction", "clip", "image", "state", "noise", "log_low", "log_high")
#: The number of different indices of a step, and of a draw. Each pair of a draw and a step has its own noise.
STEPS = 2**16
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _noise(x: Tensor, seed: Tensor, sample_ids: Tensor, draws: Tensor, step: Tensor) -> Tensor:
    """Return normal numbers in x's shape and dtype."""
    index, numel = draws * STEPS + step, math.prod(x.shape[1:])
    normals = DISTRIBUTIONS.index("normal")
    noise = drawn(seed, sample_ids, index[:, None], numel, stream=Stream.DIFFUSION, distribution=normals)
    return noise.view(x.shape).to(x.dtype)


def _parts(x: Tensor, prediction: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Return P x + Q m, v or None, and the coefficients in shapes that broadcast to x, all in x's dtype."""
    channels, numbers = x.shape[1], [per_image(number, x) for number in coefficients.unbind(-1)]
    output = prediction.to(x.dtype)
    v = output[:, channels:] if prediction.shape[1] > channels else None
    return numbers[0] * x + numbers[1] * output[:, :channels], v, numbers


def _deviation(v: Tensor | None, s: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """Return the factor of the normal numbers, which is s or s d. It is 0 if s is 0, even if v is NaN."""
    if v is None:
        return s
    share = (v + 1) / 2
    return s * torch.exp(0.5 * torch.where(s == 0, 0.0, share * hi + (1 - share) * lo))


def reference(x: Tensor, prediction: Tensor, coefficients: Tensor, *named: Any) -> Tensor:
    """Compute the op by PyTorch in x's dtype. ``named`` are the arguments seed, sample_ids, draws, step and noisy."""
    *name, noisy = named
    image, v, (*_, c, a, b, s, lo, hi) = _parts(x, prediction, coefficients)
    # Both ends of the clip pass the gradient, in contrast to torch.clamp in some versions of torch.
    clipped = torch.where((image >= -c) & (image <= c), image, image.detach().clamp(-c, c))
    out = a * clipped + b * x
    if noisy:
        out = out + _deviation(v, s, lo, hi) * _noise(x, *name)
    return out.contiguous()


def reference_backward(
    grad: Tensor, x: Tensor, prediction: Tensor, coefficients: Tensor, *named: Any
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the prediction, in their dtypes and shapes."""
    *name, noisy = named
    image, v, (p, q, c, a, b, s, lo, hi) = _parts(x, prediction, coefficients)
    through = torch.where((image >= -c) & (image <= c), a * grad, 0.0)
    to_x, to_prediction = (p * through + b * grad).contiguous(), q * through
    if v is not None:
        slope = 0.25 * (hi - lo) * _deviation(v, s, lo, hi)
        to_v = grad * _noise(x, *name) * torch.where(s == 0, 0.0, slope) if noisy else torch.zeros_like(x)
        # torch.cat raises an error for some dtypes under CPU autocast.
        with without_autocast(x.device):
            to_prediction = torch.cat([to_prediction, to_v], dim=1)
    return to_x, to_prediction.to(prediction.dtype).contiguous(memory_format=memory_format(last_channels(prediction)))


def variant(learned: bool, noisy: bool) -> str:
    """Return the op's variant, which has a flag of its own."""
    return "learned" if learned and noisy else "fixed" if noisy else "noiseless"


#: By shape, True for learned variances, True for noise, and the prediction's layout; for the values see `Example.gpu`.
EXAMPLES = {
    ((ROWS, 3, 32, 32), False, True, ""): "f",
    ((ROWS, 3, 33, 31), False, True, "channels_last"): "",
    ((ROWS, 5001), False, True, ""): "",
    ((ROWS, 3, 16, 16), True, True, ""): "",
    ((ROWS, 2, 9, 15), True, True, "channels_last"): "b",
    ((ROWS, 3, 16, 16), False, False, ""): "h",
    ((ROWS, 2, 9, 15), True, False, "channels_last"): "",
}
PROPERTIES: dict[str, Any] = {
    "variant": lambda shape, learned, noisy, _: variant(learned, noisy),
    "exact": lambda shape, learned, noisy, _: not noisy,
    "slack": lambda shape, learned, noisy, _: 16.0 if noisy else 0.0,
}


def _arguments(*setting: Any) -> tuple[Any, ...]:
    """Make arguments for which about half of the pixels are clipped. With learned variances, one row has no noise."""
    shape, learned, noisy, memory, dtype, seed = setting
    inner = wide_dtype(dtype)
    x = normal(seed, *shape).to(inner)
    prediction = normal(seed + 100, shape[0], shape[1] * (1 + learned), *shape[2:])
    coefficients = torch.tensor([1.25, -0.75, 1.0, 0.4, 0.6, 0.3, -4.0, -2.0], dtype=inner)
    if learned:
        coefficients = coefficients.repeat(ROWS, 1)
        coefficients[:, 5] = torch.tensor([1.0, 0.0, 1.0])
    drawing = torch.tensor([0, 3, 2**16 + 5]), torch.tensor([2**16 - 1])
    return x, laid_out(prediction.to(dtype), memory), coefficients, *stream(seed), *drawing, noisy


OP = define_op(
    "diffusion_step",
    "(Tensor x, Tensor prediction, Tensor coefficients, Tensor seed, Tensor sample_ids, Tensor draws, Tensor step, "
    "bool noisy) -> Tensor",
    reference=reference,
    examples=examples(_arguments, EXAMPLES, **PROPERTIES),
    # From benchmarks/results: cpu/ops.csv and nvidia-h200/kernels.csv.
    in_graphs={"cuda": ("fixed", "learned")},
)
BACKWARD = define_backward(
    OP,
    "(Tensor grad, Tensor x, Tensor prediction, Tensor coefficients, Tensor seed, Tensor sample_ids, Tensor draws, "
    "Tensor step, bool noisy) -> (Tensor, Tensor)",
    reference=reference_backward,
    fake=lambda grad, x, m, *_: (
        x.new_empty(x.shape),
        torch.empty_like(m, memory_format=memory_format(last_channels(m))),
    ),
    changes={"exact": lambda shape, learned, noisy, _: not (learned and noisy)},
    in_graphs={"cuda": ("learned",)},
)


def _backward(grad: Tensor, x: Tensor, prediction: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    which = variant(prediction.shape[1] > x.shape[1], args[-1])
    return BACKWARD(grad, x, prediction, *args, variant=which)


_diffusion_step = differentiable(OP.handle, _backward)


def _check(x: Tensor, prediction: Tensor, coefficients: Tensor) -> None:
    """Raise ValueError if the shapes or dtypes do not match."""
    check_floating(x=x, prediction=prediction, coefficients=coefficients)
    if x.dim() < 2 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x must be float32 or float64 [B, C, ...], got {x.dtype} {list(x.shape)}")
    batch, channels, *rest = x.shape
    if prediction.shape not in (x.shape, (batch, 2 * channels, *rest)):
        needs = f"[B, C, ...] = {list(x.shape)} or [B, 2C, ...]"
        raise ValueError(f"prediction must be {needs}, got {list(prediction.shape)}")
    dtypes = DTYPES if x.dtype == torch.float32 else (torch.float64,)
    if prediction.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"prediction must be one of {names} where x is {x.dtype}, got {prediction.dtype}")
    shapes = ((len(COEFFICIENTS),), (batch, len(COEFFICIENTS)))
    if coefficients.shape not in shapes or coefficients.dtype != x.dtype:
        got = f"{coefficients.dtype} {list(coefficients.shape)}"
        raise ValueError(f"coefficients must be {x.dtype} [8] or [B, 8] = {list(shapes[1])}, got {got}")


def diffusion_step(
    x: Tensor,
    prediction: Tensor,
    coefficients: Tensor,
    *,
    seed: Tensor | None = None,
    sample_ids: Tensor | None = None,
    draws: Tensor | None = None,
    step: Tensor | None = None,
    noisy: bool = True,
) -> Tensor:
    """Take a step of a diffusion sampler, or of the forward process.

    Args:
        x: state, ``[B, C, ...]``; float32 or float64; in the units of the process, in which images are usually in
            [-1, 1]. Several rows of a batch may be draws of the same image.
        prediction: output of the network for x, ``[B, C, ...]``, or ``[B, 2C, ...]`` with learned variances; float16,
            bfloat16 or float32 (float64 for a float64 x); contiguous or channels_last (other layouts are copied).
        coefficients: numbers named in `COEFFICIENTS`, ``[8]`` for the whole batch or ``[B, 8]``, with x's dtype and
            device, which the host never reads. Without learned variances the last two are ignored. They get no
            gradient.
        seed: int64 ``[1]``, on x's device. None: a new seed from PyTorch's generator of this device.
        sample_ids: int64 ``[B]``, the global index of each row's image (see `philox`). None: 0 to B - 1.
        draws: int64 ``[B]``, the index of each row among the draws of its image, from 0 to 65,535. None: 0.
        step: int64 ``[1]``, the index of the step, from 0 to 65,535. For a given seed, each time noise is added to a
            row, the index must be different, also for the forward process. It may be None only without a seed.
        noisy: True to add noise. With False, nothing is drawn, and the coefficient of the noise is ignored.

    Returns:
        The next state, in x's shape and dtype, contiguous, also under autocast.

    Raises:
        TypeError: seed or sample_ids is neither None nor a tensor.
        ValueError: shapes, dtypes or devices do not match, or noise is added with a seed but without a step.

    x and the prediction have first-order gradients. Both ends of the clip pass the gradient. NaN propagates, except
    from v where the coefficient of the noise is 0. For a given seed the op is deterministic, for every split and order
    of the batch. The noise of two backends differs by a few ulp at most. The kernels do not support ``vmap``.
    """
    _check(x, prediction, coefficients)
    if step is None and seed is not None and noisy:
        raise ValueError("step must be given with a seed, because equal steps of a seed have equal noise, got None")
    draws = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device) if draws is None else draws
    step = torch.zeros(1, dtype=torch.int64, device=x.device) if step is None else step
    check_form("draws", draws, torch.int64, "[B]", x.shape[:1])
    check_form("step", step, torch.int64, "[1]", (1,))
    others = {"x": x, "prediction": prediction, "coefficients": coefficients, "draws": draws, "step": step}
    seed, sample_ids = default_stream(seed, sample_ids, x.shape[0], **others)
    which = variant(prediction.shape[1] > x.shape[1], noisy)
    kernel = _diffusion_step if needs_gradient(x, prediction) else OP.handle
    call = reference if OP.uses_reference(x.device, x.numel(), which) else kernel
    tensors = [x, prediction, coefficients.detach(), seed, sample_ids, draws, step]
    if torch.compiler.is_compiling():
        # torch.compile rejects an op that gets a tensor twice, so each repetition is replaced with a view.
        for at, tensor in enumerate(tensors):
            if any(tensor is before for before in tensors[:at]):
                tensors[at] = tensor.view_as(tensor)
    return call(*tensors, noisy)
