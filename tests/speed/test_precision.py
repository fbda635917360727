"""What float32 means on a GPU; the settings can be read without one."""

import pytest
import torch

from purify_fast.evaluation import evaluate
from purify_fast.speed.precision import float32_products, whole_float32_by_default
from purify_fast.training import fit


def settings() -> tuple[bool, bool]:
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision() != "highest"


@pytest.mark.parametrize("products", ["highest", "high", "medium"])
def test_products_are_ieee_unless_tf32_is_asked_for_and_the_settings_are_restored(products):
    own = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(products)
        before = settings()
        with float32_products():
            assert settings() == (False, False)
            with float32_products(tf32=True):
                assert settings() == (True, True)
            assert settings() == (False, False)
        assert settings() == before and torch.get_float32_matmul_precision() == products
    finally:
        torch.set_float32_matmul_precision(own)


def test_settings_made_by_the_newer_names_are_restored():
    setting = torch.backends.cudnn.conv
    before = setting.fp32_precision
    try:
        setting.fp32_precision = "ieee"
        with float32_products(tf32=True):
            assert settings() == (True, True)
        assert setting.fp32_precision == "ieee"
    finally:
        setting.fp32_precision = before


def test_training_and_evaluation_use_whole_float32_unless_the_caller_chose():
    before = settings()
    found = whole_float32_by_default()(settings)
    assert found() == (False, False)
    with float32_products(tf32=True):
        assert found() == (True, True)
    assert settings() == before
    assert fit.__wrapped__ and evaluate.__wrapped__  # both are decorated with it
