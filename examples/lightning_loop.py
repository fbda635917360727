"""Use a task's training step in another training loop, such as Lightning's.

A task has a model, an optimizer and a training step, so it can be trained without `fit`. If Lightning is not installed,
the class `Loop` of this script calls the module in the same way as Lightning's trainer.

    python examples/lightning_loop.py
"""

from __future__ import annotations

from typing import Any

import torch
import tyro

import purify_fast
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.training import Batch, TrainingAttack

try:
    from lightning import LightningModule as Module, Trainer
except ImportError:
    Module, Trainer = torch.nn.Module, None


class Purifier(Module):
    """A Lightning module that trains CARSO's purifier.

    Args:
        task: the task, which contains the defence.
        epochs: number of epochs of the whole training, for the schedules.
    """

    def __init__(self, task: CarsoTask, epochs: int):
        super().__init__()
        self.task, self.epochs, self.defence = task, epochs, task.model
        self.step = 0

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        x, y, ids = batch
        epoch = self.current_epoch if Trainer else 0
        self.step += 1
        one = Batch(x, y, sample_ids=ids, seed=self.step, epoch=epoch, epochs=self.epochs)
        loss, metrics = self.task.training_step(one)
        if Trainer:
            self.log_dict(metrics)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.task.optimizer


class Loop:
    """A minimal replacement of Lightning's trainer.

    Args:
        max_epochs: number of epochs.
    """

    def __init__(self, max_epochs: int):
        self.max_epochs = max_epochs

    def fit(self, module: Purifier, loader: Any) -> None:
        """Train a module.

        Args:
            module: module with a training step and an optimizer.
            loader: loader of the batches.
        """
        optimizer = module.configure_optimizers()
        for _ in range(self.max_epochs):
            for index, batch in enumerate(loader):
                optimizer.zero_grad()
                module.training_step(batch, index).backward()
                optimizer.step()


def main(epochs: int = 2, images: int = 32) -> None:
    """Train a small purifier on random images.

    Args:
        epochs: number of epochs.
        images: number of images.
    """
    torch.manual_seed(0)
    x, y = torch.rand(images, 3, 32, 32), torch.arange(images) % 10
    classifier = purify_fast.models.build_classifier("small_cnn", (3, 32, 32), 10).eval()
    defence = Carso(classifier, ["conv3", "conv4"], (3, 32, 32), cond_dim=32, latent_dim=8, samples=2)
    task = CarsoTask(defence, CarsoConfig(attack=TrainingAttack(eps=8 / 255, steps=2)))
    # The third tensor has the index of each image in the data set. The random draws depend on this index, not on the
    # place in the batch.
    data = torch.utils.data.TensorDataset(x, y, torch.arange(images))
    loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=epochs, **quiet) if Trainer else Loop(epochs)
    trainer.fit(Purifier(task, epochs), loader)
    name = "Lightning" if Trainer else "a loop like Lightning's"
    print(f"trained by {name}; logits {tuple(defence.eval()(x[:2]).shape)}")


if __name__ == "__main__":
    tyro.cli(main)
