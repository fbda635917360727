"""precision "tf32": while a task with it is trained, and no longer, float32 products may be rounded on a GPU."""

import pytest
import torch
from small_runs import SHAPE, Listener, arrest_task, atop_task, carso_task, classifier_task

from purify_fast.methods.carso import CarsoConfig
from purify_fast.training import FitConfig, fit

pytestmark = pytest.mark.usefixtures("one_thread")


class Settings(Listener):
    """Notes what float32 means in each step."""

    def __init__(self):
        self.noted = set()

    def on_step(self, state):
        self.noted.add((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))


def carso(precision):
    return carso_task(kl_delay=0.0, precision=precision)


@pytest.mark.parametrize("make", [arrest_task, carso, atop_task, classifier_task])
def test_products_are_rounded_while_it_is_trained_if_asked(make):
    x = torch.randint(256, (16, *SHAPE), dtype=torch.uint8)
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    for precision, expected in (("float32", (False, "highest")), ("tf32", (True, "high"))):
        heard = Settings()
        task, config = make(precision=precision), FitConfig(epochs=1, batch_size=8)
        fit(task, x, torch.arange(16) % 10, config, callbacks=[heard], progress=False)
        assert heard.noted == {expected}
        assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == before


def test_joint_training_takes_it():
    assert CarsoConfig(joint=True, attack_target="pipeline", precision="tf32").precision == "tf32"
    with pytest.raises(ValueError, match="joint training needs precision 'float32' or 'tf32', got 'bfloat16'"):
        CarsoConfig(joint=True, attack_target="pipeline", precision="bfloat16")
