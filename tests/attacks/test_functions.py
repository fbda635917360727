"""The attacks as functions: their arguments and their defaults."""

import inspect

import pytest
import torch
from direct import direct

from purify_fast import attacks

FUNCTIONS = [attacks.pgd, attacks.fgsm, attacks.apgd, attacks.fab_t, attacks.square, attacks.stadv]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_signature_names_every_keyword_with_its_type_and_default(function):
    first, *others = inspect.signature(function).parameters.values()
    keywords = [each for each in others if each.kind is each.KEYWORD_ONLY]
    assert [each.name for each in (first, *others[:3])] == ["model", "x", "y", "eps"]
    assert others[3:] == keywords and 0 < len(keywords) <= 14
    assert all(each.default is not each.empty and each.annotation is not each.empty for each in keywords)


def test_a_function_runs_its_class_with_its_defaults(model):
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    y, options = model(x).argmax(1), {"eps": 0.1, "seed": 3}
    for function, short in zip(FUNCTIONS, [{}, {}, {}, {}, {"n_queries": 50}, {}], strict=True):
        how = ({} if function is attacks.stadv else {"eps": 0.1}) | short
        how |= {} if function is attacks.fgsm else {"seed": 3}
        assert torch.equal(function(model, x, y, **how), direct(function, model, x, y, **how)), function
    assert not torch.equal(attacks.pgd(model, x, y, **options), attacks.pgd(model, x, y, **options, steps=1))
