"""What PyTorch's CUDA functions for synchronized BatchNorm compute, by their definitions, on CPUs and fake tensors."""

import torch


def channels(x):
    """The dimensions that a statistic of a channel is over, and the shape that broadcasts one over x."""
    return [0, *range(2, x.dim())], [-1, *[1] * (x.dim() - 2)]


def wide(x):
    return x if x.dtype == torch.float64 else x.float()


def stats(x, eps):
    variance, mean = torch.var_mean(wide(x), channels(x)[0], correction=0)
    return mean, torch.rsqrt(variance + eps)


def gather_stats_with_counts(x, means, inverses, running_mean, running_var, momentum, eps, counts):
    assert means.shape == inverses.shape == (len(counts), x.shape[1]) and means.dtype == inverses.dtype == wide(x).dtype
    assert counts.dtype == (x if running_mean is None else running_mean).dtype
    n = counts.to(means.dtype)[:, None]
    mean = (n * means).sum(0) / n.sum()
    squares = (n * (inverses**-2 - eps + (means - mean) ** 2)).sum(0)
    if running_mean is not None:
        running_mean.copy_((1 - momentum) * running_mean + momentum * mean)
        running_var.copy_((1 - momentum) * running_var + momentum * squares / (n.sum() - 1))
    return mean, torch.rsqrt(squares / n.sum() + eps)


def elemt(x, weight, bias, mean, inverse, eps):
    shape = channels(x)[1]
    scaled = (wide(x) - mean.view(shape)) * (inverse * weight).view(shape) + bias.view(shape)
    return scaled.to(x.dtype)


def backward_reduce(grad, x, mean, inverse, weight, of_x, of_weight, of_bias):
    over, shape = channels(x)
    sum_dy = wide(grad).sum(over)
    sum_dy_xmu = (wide(grad) * (wide(x) - mean.view(shape))).sum(over)
    return sum_dy, sum_dy_xmu, (sum_dy_xmu * inverse).to(weight.dtype), sum_dy.to(weight.dtype)


def backward_elemt(grad, x, mean, inverse, weight, sum_dy, sum_dy_xmu, counts):
    assert counts.dtype == torch.int32 and weight.dtype == mean.dtype
    shape = channels(x)[1]
    own = wide(grad) - (sum_dy / counts.sum()).view(shape)
    through = (wide(x) - mean.view(shape)) * (inverse**2 * sum_dy_xmu / counts.sum()).view(shape)
    return ((own - through) * (inverse * weight).view(shape)).to(x.dtype)


FUNCTIONS = {
    "stats": stats,
    "gather_stats_with_counts": gather_stats_with_counts,
    "elemt": elemt,
    "backward_reduce": backward_reduce,
    "backward_elemt": backward_elemt,
}


def register(library, key):
    """Let PyTorch's functions be these."""
    for name, function in FUNCTIONS.items():
        library.impl(f"batch_norm_{name}", function, key)
