"""Defences that version 0.1 saved are read back, and predict as they did.

``files/saved`` was written by commit 55787ee: a CARSO and an AToP with arguments under their old names, their
classifier beside them, and the logits that they gave under ``fixed_noise(3)``.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import purify_fast

SAVED = Path(__file__).parent / "files" / "saved"


@pytest.mark.parametrize("name", ["carso", "atop"])
def test_a_defence_of_version_0_1_predicts_as_it_did(name):
    defence, was = purify_fast.load_defence(SAVED / name), load_file(SAVED / "logits.safetensors")
    with torch.no_grad(), defence.fixed_noise(3):
        torch.testing.assert_close(defence(was["x"]), was[name], rtol=1e-5, atol=1e-5)


def test_what_it_saves_again_has_the_new_names(tmp_path):
    atop = purify_fast.load_defence(SAVED / "atop")
    assert (atop.mask_ratio, atop.num_passes, atop.aggregation) == (0.5, 4, "mean_softmax")
    atop.save(tmp_path)
    again = purify_fast.load_defence(tmp_path, atop.classifier)
    assert again.arguments == atop.arguments and "missing" not in atop.arguments
    assert purify_fast.load_defence(SAVED / "carso").arguments["version"] == "v4"


def test_old_arguments_still_work_and_warn():
    classifier = purify_fast.load_classifier(SAVED / "carso" / "classifier")
    with pytest.warns(DeprecationWarning, match="'form'.*'version'"):
        made = purify_fast.Carso(classifier, ["conv2"], (1, 8, 8), 4, 2, 2, decoder_width=2, form="v4")
    assert made.arguments["version"] == "v4"
    generator = purify_fast.methods.atop.SmallGenerator(1, width=2)
    with pytest.warns(DeprecationWarning, match="mask_ratio|num_passes|mean_softmax"):
        atop = purify_fast.Atop(classifier, generator, (1, 8, 8), missing=0.5, block=2, aggregation="probability")
    assert atop.mask_ratio == 0.5 and atop.aggregation == "mean_softmax"


def test_warnings_point_to_the_user():
    """A DeprecationWarning that points into the package is hidden by Python's default filters."""
    classifier = purify_fast.load_classifier(SAVED / "carso" / "classifier")
    generator = purify_fast.methods.atop.SmallGenerator(1, width=2)
    with pytest.warns(DeprecationWarning) as seen:
        assert purify_fast.load is purify_fast.load_defence
        purify_fast.Atop(classifier, generator, (1, 8, 8), missing=0.5, block=2, aggregation="probability")
    assert len(seen) == 3 and {warning.filename for warning in seen} == {__file__}
