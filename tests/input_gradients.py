"""The gradient that attacks follow."""

from purify_fast.attacks.objective import Objective
from purify_fast.attacks.shared_draws import drawn_once_per_call


def input_gradient(model, x, y, *, loss="ce", eot_iter=1, max_forward_batch=None):
    """Gradient to the input of the loss summed over the draws, and the mean loss over the draws."""
    apart = drawn_once_per_call(model, x, eot_iter, max_forward_batch)
    gradient = Objective(model, loss, eot_iter, max_forward_batch, apart=apart).gradient(x.detach().clone(), y)
    return gradient.image, gradient.loss
