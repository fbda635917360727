"""The objectives of TRADES (Zhang et al., ICML 2019) and MART (Wang et al., ICLR 2020), from logits.

With p = softmax(logits) of the clean image, q = softmax(logits) of the attacked image, and the label y:

    TRADES:  CE(p, y) + beta KL(p || q),                                 attacked by the KL divergence
    MART:    -log q_y - log(1 - max_{k != y} q_k) + beta (1 - p_y) KL(p || q),  attacked by cross-entropy
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

#: The weight of the second term in the papers.
BETA = {"trades": 6.0, "mart": 5.0}
#: Standard deviation of the normal random start of TRADES, in image units.
TRADES_START = 1e-3


def divergence(attacked: Tensor, clean: Tensor) -> Tensor:
    """Return KL(softmax(clean) || softmax(attacked)) of each image, ``[B]``, from logits."""
    # With probabilities as the target, the gradient would be NaN where a probability is 0.
    return F.kl_div(F.log_softmax(attacked, 1), F.log_softmax(clean, 1), reduction="none", log_target=True).sum(1)


def trades(clean: Tensor, attacked: Tensor, y: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Return the loss of TRADES, a mean over the images."""
    loss = F.cross_entropy(clean, y, label_smoothing=label_smoothing)
    return loss + beta * divergence(attacked, clean).mean()


def mart(clean: Tensor, attacked: Tensor, y: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Return the loss of MART, a mean over the images. log(1 - q_k) is computed without a cancellation."""
    attacked, label, low = attacked.float(), y[:, None], float("-inf")
    other = attacked.detach().scatter(1, label, low).argmax(1, keepdim=True)
    margin = attacked.logsumexp(1) - attacked.scatter(1, other, low).logsumexp(1)
    boosted = F.cross_entropy(attacked, y, label_smoothing=label_smoothing) + margin.mean()
    p = F.softmax(clean, 1)
    return boosted + beta * (divergence(attacked, clean) * (1 - p.gather(1, label)[:, 0])).mean()
