"""CARSO as its authors evaluate it: AutoAttack (rand) through PeeL, judged by one prediction of PeeL."""

from dataclasses import replace

import pytest
import torch

from purify_fast.attacks import AutoAttack
from purify_fast.evaluation import evaluate
from purify_fast.evaluation.protocols import AttackedModel, protocol_attacks
from purify_fast.methods.carso import Carso
from purify_fast.models.classifiers import SmallCNN

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_published_output_is_attacked_and_judges():
    pytest.importorskip("pyautoattack")
    torch.manual_seed(0)
    classifier = SmallCNN(1, image_size=(16, 16), width=2)
    with torch.no_grad():
        # sure enough for infinities in the published output
        classifier.head.weight.mul_(1000)
    sizes = {"cond_dim": 4, "latent_dim": 2, "samples": 3, "decoder_width": 2}
    defence = Carso(classifier, ["conv2"], (1, 16, 16), **sizes).eval()
    x = torch.rand(1, 1, 16, 16)
    with torch.no_grad():
        assert not defence.peel_reference(x).isfinite().all()
        y = defence(x).argmax(1)
    (spec,) = protocol_attacks("authors", AttackedModel(defence, x, 10, is_random=True, eps=0.05))
    assert spec.label == "as src/eval_a.py (emaballarin/CARSO): AutoAttack rand through PeeL, K = 3"
    assert spec.attack == AutoAttack(version="rand")
    # fewer steps and draws than its 100 and 20, which take a minute
    short = replace(spec, attack=AutoAttack(version="rand", steps=5, eot_iter=2))
    row = evaluate(defence, x, y, eps=0.05, attacks=[short], progress=False).row(spec.label)
    # nothing can be found through NaN, and the report says so
    assert row.accuracy == 1 and row.n_eval == 1 and not row.reliable and row.health["nonfinite"] > 0
    assert row.settings["judge"] == "WithAggregation" and row.kind == "authors"
    with torch.no_grad(), defence.fixed_noise(0):
        assert torch.equal(spec.judge(x), defence.peel_reference(x))
