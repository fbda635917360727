"""precision "tf32": while a task with it is trained, and no longer, float32 products may be rounded on a GPU."""

import pytest
import torch

from purify_fast.methods.arrest import ArrestConfig, ArrestTask
from purify_fast.methods.atop import Atop, AtopConfig, AtopTask, SmallGenerator
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, fit
from purify_fast.training.attack import TrainingAttack

SHAPE = (1, 16, 16)
ATTACK = TrainingAttack(eps=0.1, steps=2)
pytestmark = pytest.mark.usefixtures("one_thread")


def arrest(precision: str) -> ArrestTask:
    return ArrestTask(SmallCNN(width=4), ArrestConfig(attack=ATTACK, precision=precision), SHAPE)


def carso(precision: str) -> CarsoTask:
    made = Carso(SmallCNN(width=4), ["conv2", "hidden"], SHAPE, 8, 4, 2, decoder_width=2)
    return CarsoTask(made, CarsoConfig(attack=ATTACK, kl_delay=0.0, precision=precision))


def atop(precision: str) -> AtopTask:
    made = Atop(SmallCNN(width=4), SmallGenerator(1, width=2), SHAPE, block=4, sigma=0.1)
    return AtopTask(made, AtopConfig(cls_delay=0, precision=precision))


class Settings:
    """Notes what float32 means in each step."""

    def __init__(self):
        self.found = set()

    def on_step(self, state) -> None:
        self.found.add((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))

    def on_epoch(self, state) -> None:
        pass

    def on_end(self, state) -> None:
        pass


def classifier(precision: str) -> ClassifierTask:
    return ClassifierTask(SmallCNN(width=4), ClassifierConfig(precision=precision))


@pytest.mark.parametrize("make", [arrest, carso, atop, classifier])
def test_products_are_rounded_while_it_is_trained_if_asked(make):
    x = torch.randint(256, (16, *SHAPE), dtype=torch.uint8)
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    for precision, expected in (("float32", (False, "highest")), ("tf32", (True, "high"))):
        heard = Settings()
        fit(
            make(precision),
            x,
            torch.arange(16) % 10,
            FitConfig(epochs=1, batch_size=8),
            callbacks=[heard],
            progress=False,
        )
        assert heard.found == {expected}
        assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == before


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match=r"precision.*'half'"):
        ClassifierConfig(precision="half")


def test_joint_training_takes_it():
    assert CarsoConfig(joint=True, attack_target="pipeline", precision="tf32").precision == "tf32"
    with pytest.raises(ValueError, match="joint training needs precision 'float32' or 'tf32', got 'bfloat16'"):
        CarsoConfig(joint=True, attack_target="pipeline", precision="bfloat16")
