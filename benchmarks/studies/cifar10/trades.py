"""TRADES (Zhang et al., ICML 2019) as a control: one network, trained on clean images and held smooth around them.

    L = CE(f(x), y) + beta KL(f(x) || f(x')),   x' = PGD on the cross-entropy within the ball

The paper's inner attack raises the divergence itself. Gowal et al. ("Uncovering the limits of adversarial training",
arXiv 2010.03593) compared both; here it is the cross-entropy, which the package's PGD has.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from purify_fast.methods.arrest import ArrestTask
from purify_fast.training import Batch

#: The weight of the divergence, as the paper has it for CIFAR-10.
BETA = 6.0


class TradesTask(ArrestTask):
    """TRADES with what `ArrestTask` brings: its attack, optimizer, schedule, precision and moving average.

    Its config has neither distillation nor replay, and no weight perturbation.
    """

    def training_step(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        attacked, _ = self.inputs(batch, [])
        # one pass: BatchNorm sees clean and attacked images together
        logits = self.forward(torch.cat([batch.x, attacked]))[0].float()
        clean, moved = logits.chunk(2)
        cross_entropy = F.cross_entropy(clean, batch.y)
        divergence = F.kl_div(moved.log_softmax(1), clean.log_softmax(1), reduction="batchmean", log_target=True)
        metrics = {
            "cross_entropy": cross_entropy.detach(),
            "divergence": divergence.detach(),
            "accuracy": (moved.detach().argmax(1) == batch.y).float().mean(),
        }
        return cross_entropy + BETA * divergence, metrics

    def describe(self) -> dict[str, object]:
        return super().describe() | {"task": "trades", "beta": BETA}
