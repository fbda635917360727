"""Loops of other people: the contestants agree, and the table has the numbers of the results file."""

import csv
import importlib.util
import io
from argparse import Namespace

import pytest

from benchmarks import RESULTS
from benchmarks.speed import elsewhere, sheets
from benchmarks.speed.elsewhere import measuring, small_networks
from benchmarks.speed.elsewhere.loops import PKG_RESOURCES
from purify_fast.speed.precision import PER_VALUE, PRODUCTS

#: These rows need no further package.
OWN = [name for name, row in elsewhere.registry().items() if not row.package]


def measured(folder, names, **options):
    measuring.main(Namespace(names=names, quick=True, out=folder, **{"resume": False} | options))
    (path,) = folder.iterdir()
    return {row["row"]: row for row in csv.DictReader(io.StringIO(path.read_text()))}


@pytest.mark.slow
def test_this_package_and_the_expert_compute_what_the_loops_of_others_compute(tmp_path):
    rows = measured(tmp_path, OWN)
    assert list(rows) == OWN
    for name, row in rows.items():
        assert float(row["loss_ours"]) < 1e-4 and float(row["logits_ours"]) < 1e-4, name
        assert float(row["theirs_ms"]) > 0 and float(row["loss_expert"]) < 1e-4, name
        # A sign of a vanishing gradient may differ in the expert's attack.
        assert float(row["gradients_ours"]) < 1e-2 and float(row["gradients_expert"] or 0) < 1e-2, name
        assert int(row["lines_ours"]) <= 6 < int(row["lines_expert"]), name


@pytest.mark.parametrize("name", [name for name in elsewhere.registry() if name not in OWN])
def test_attacks_of_packages_run(name, tmp_path):
    package = elsewhere.registry()[name].package
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if package == "robustbench" and not PKG_RESOURCES.is_dir():
        pytest.skip("robustbench is not installed with a setuptools that has pkg_resources")
    row = measured(tmp_path, [name])[name]
    assert float(row["theirs_ms"]) > 0 and float(row["loss_expert"]) < 1e-3


def test_the_committed_rows_of_copies_follow_the_present_rule():
    rows = sheets.read_csv(RESULTS / "cpu" / "elsewhere_copies.csv")
    assert len(rows) == 40
    for row in rows:
        products, values = int(row["products"]), int(row["values"])
        dense = products >= PER_VALUE * values and int(row["images"]) * products >= PRODUCTS
        assert row["auto"] == ("bfloat16" if dense else "float32"), row["row"]


def test_all_rows_of_small_networks_are_measured_and_committed(tmp_path):
    small_networks.run([small_networks.NAME], quick=True, out=tmp_path, resume=False)
    written, committed = (sheets.read_csv(folder / small_networks.FILE) for folder in (tmp_path, RESULTS / "cpu"))
    for rows in (written, committed):
        assert [(row["row"], int(row["images"])) for row in rows] == [*small_networks.ROWS]
    for row in committed:
        timed = ("call", "call_copy") if row["row"] == small_networks.CALL else small_networks.ATTACKS
        assert all(float(row[f"{who}_us"]) > 0 for who in timed), row["row"]
