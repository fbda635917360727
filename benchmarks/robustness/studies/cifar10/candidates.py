"""TRADES, and candidates for better defences on CIFAR-10.

A candidate is a method that could be more robust than the base, which is the adversarially trained classifier of the
study. The candidates are variants of CARSO, and a mixture of two classifiers. The variants start from the purifier that
was trained with the paper's objective, and are trained through the pipeline. The mixture needs no training.

Every candidate has a row in the table, even if it is not better than the base. No setting is chosen on test images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
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


@dataclass(frozen=True)
class Candidate:
    """A way to train a defence through the pipeline.

    Attributes:
        source: authors and publication of the method.
        loss: name of the loss.
        joint: True to train the classifier too.
        late: True if CARSO reads only the last stage of the classifier.
    """

    source: str
    loss: Loss = "cross_entropy"
    joint: bool = False
    late: bool = False


#: The candidates by the names of their rows.
CANDIDATES = {
    "CARSO pipeline, joint": Candidate("purifier and classifier are trained together (our own idea)", joint=True),
    "CARSO pipeline, late layers": Candidate("the condition comes from the last stage alone (our own idea)", late=True),
    "CARSO pipeline, TRADES": Candidate("the loss of Zhang et al., ICML 2019, arXiv 1901.08573", loss="trades"),
    "CARSO pipeline, distilled": Candidate(
        "the base's probabilities as targets, as in ARD by Goldblum et al., AAAI 2020, arXiv 1905.09747",
        loss="distilled",
    ),
}
#: The row of the mixture of an accurate classifier and a robust classifier, after Bai et al., "MixedNUTS", TMLR 2024,
#: arXiv 2402.02263.
MIXED = "standard and PGD-AT, mixed"
#: The rows from which the best candidate is chosen.
ELIGIBLE = (MIXED, *CANDIDATES)


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
        return self.model.classify(self.model.reconstruct(x)).flatten(0, 1).float().log_softmax(1)

    def training_step(self, batch: Batch) -> tuple[Tensor, Metrics]:
        if self.loss != "trades":
            return super().training_step(batch)
        labels = batch.y.repeat_interleave(self.config.train_samples)
        with as_trained(self.model, batch, self.config):
            moved = self._predictions(self.config.attack.run(self.model, batch, graphs=self.graphs))
            wanted = self._predictions(batch.x)
        divergence = F.kl_div(moved, wanted, reduction="batchmean", log_target=True)
        accuracy = (moved.detach().argmax(1) == labels).float().mean()
        loss = F.nll_loss(wanted, labels) + BETA * divergence
        return loss, {"divergence": divergence.detach(), "accuracy": accuracy}

    def describe(self) -> dict[str, object]:
        return super().describe() | {"task": "candidate", "loss": self.loss}


class Mixed(nn.Module):
    """A mixture of two models. Its logits are the logarithm of a weighted mean of the models' probabilities.

    A robust model is usually more confident when it is right than when it is wrong. Here a power of the robust model's
    normalized logits increases this difference, so that the accurate model decides mostly where the robust model is
    unsure. We chose the constants ourselves.

    Args:
        accurate: model with the higher clean accuracy.
        robust: robust model, whose probabilities have the larger weight.
    """

    SHARE, SCALE, SHIFT, POWER = 0.9, 5.0, 0.5, 3.0

    def __init__(self, accurate: nn.Module, robust: nn.Module):
        super().__init__()
        self.accurate, self.robust = accurate, robust

    def forward(self, x: Tensor) -> Tensor:
        robust = self.robust(x).float()
        sure = self.SCALE * (F.layer_norm(robust, robust.shape[1:]) + self.SHIFT).relu() ** self.POWER
        accurate = self.accurate(x).float().log_softmax(1) + math.log(1 - self.SHARE)
        return torch.logaddexp(accurate, sure.log_softmax(1) + math.log(self.SHARE))
