"""TRADES, and candidates for better defences on CIFAR-10.

A candidate is a method that could be more robust than the base, which is the adversarially trained classifier of the
study. The candidates are variants of CARSO. They start from the purifier that was trained with the paper's objective,
and are trained through the pipeline.

Every candidate has a row in the table, even if it is not better than the base. No setting is chosen on test images.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from purify_fast.methods.arrest import ArrestTask
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.methods.carso.task import as_trained
from purify_fast.training import Batch
from purify_fast.training.task import Metrics

#: The weight of the divergence in TRADES. The paper has the same weight for CIFAR-10.
BETA = 6.0


class TradesTask(ArrestTask):
    """TRADES (Zhang et al., ICML 2019), the training of a single network with which the defences are compared.

        L = CE(f(x), y) + beta KL(f(x) || f(x')),   x' = PGD on the cross-entropy within the ball

    In the paper, the inner attack maximizes the divergence. Here it maximizes the cross-entropy, because this package's
    PGD has the cross-entropy as a loss, but not the divergence. Gowal et al. ("Uncovering the limits of adversarial
    training", arXiv 2010.03593) compared the two attacks. The attack, the optimizer, the schedule, the precision and
    the moving average are those of `ArrestTask`. The config must have no distillation, no replay and no weight
    perturbation.
    """

    def training_step(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        attacked, _ = self.inputs(batch, [])
        # Use a single pass, so that BatchNorm computes its statistics over clean and attacked images together.
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


Loss = Literal["cross_entropy", "trades", "distilled"]
#: The losses of the candidates, by the names of their rows.
CANDIDATES: dict[str, Loss] = {"CARSO pipeline, TRADES": "trades", "CARSO pipeline, distilled": "distilled"}


class CandidateTask(CarsoTask):
    """CARSO's training through the pipeline with another loss.

    Args:
        defence: defence that is trained.
        config: settings of a training through the pipeline. For the loss "distilled", the setting ``targets`` must be
            "classifier".
        origin: fingerprint of the purifier at the start.
        loss: with "trades", the loss is that of TRADES on the predictions of the whole defence. With the other names,
            the loss is that of the config.
    """

    def __init__(self, defence: Carso, config: CarsoConfig, origin: str, loss: Loss):
        super().__init__(defence, config, origin)
        self.loss: Loss = loss

    def _predictions(self, x: Tensor) -> Tensor:
        """Return the log-probabilities of each sample, ``[B K, classes]``."""
        return self.trained.classify(self.trained.reconstruct(x)).flatten(0, 1).float().log_softmax(1)

    def training_step(self, batch: Batch) -> tuple[Tensor, Metrics]:
        if self.loss != "trades":
            return super().training_step(batch)
        labels = batch.y.repeat_interleave(self.config.train_samples)
        with as_trained(self.trained, batch):
            moved = self._predictions(self.config.attack.run(self.trained, batch, graphs=self.graphs))
            wanted = self._predictions(batch.x)
        divergence = F.kl_div(moved, wanted, reduction="batchmean", log_target=True)
        accuracy = (moved.detach().argmax(1) == labels).float().mean()
        loss = F.nll_loss(wanted, labels) + BETA * divergence
        return loss, {"divergence": divergence.detach(), "accuracy": accuracy}

    def describe(self) -> dict[str, object]:
        return super().describe() | {"task": "candidate", "loss": self.loss}
