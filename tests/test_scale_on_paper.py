"""Scaling on paper: the formula by hand, its inputs, and what the page repeats."""

import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import scale_on_paper as paper
from benchmarks.scale_on_paper import MACHINES, NETWORKS, Machines, Network, Speed
from convnet import cli, models

ROOT = Path(__file__).resolve().parent.parent
# 1 s alone; 8 bytes over links of 14 and 7 bytes/s; hops of 0.1 and 0.01 s.
NETWORK, SPEED = Network(8, 2), Speed("", 10, 10, "")
PAIR = r"([\d.]+) to ([\d.]+)"
ON = Machines(4, 14, 7, "", hop_inside=0.01, hop_outside=0.1, base=0.5)


@pytest.mark.parametrize(
    "devices, exchange, wait",
    [
        (1, 0, 0),
        (2, 8 / 14, 0.5 + 2 * 0.01),
        (4, 2 * 3 / 4 * 8 / 14, 0.5 + 6 * 0.01),
        (16, 2 * 3 / 4 * 8 / 14 + 2 * 3 / 4 * 8 / 7, 0.5 + 6 * 0.01 + 4 * 0.1),
    ],
)
def test_a_step_by_hand(devices, exchange, wait):
    shown = paper.step_seconds(NETWORK, SPEED, ON, devices, hides=False)
    assert shown == pytest.approx(1 + exchange + 2 * wait)
    hidden = paper.step_seconds(NETWORK, SPEED, ON, devices, hides=True)
    assert hidden == pytest.approx(1 + max(0, exchange - 2 / 3) + 2 * wait)
    found = paper.efficiency(NETWORK, SPEED, ON, devices, False)
    assert found == pytest.approx(1 / shown)


@pytest.mark.parametrize("name", ["resnet50", "vgg16"])
def test_bytes_are_those_of_the_params(name):
    model = models.create(name, num_outputs=1000, dtype="float32")
    init = lambda x: model.init(jax.random.key(0), x, train=False)  # noqa: E731
    variables = jax.eval_shape(init, jnp.zeros((1, 224, 224, 3)))
    gradient = sum(4 * math.prod(x.shape) for x in jax.tree.leaves(variables["params"]))
    statistics = jax.tree.leaves(variables.get("batch_stats", {}))
    # Mean and variance forwards, two sums backwards: two of them with the gradient's.
    assert gradient <= NETWORKS[name].bytes < gradient + 1e6
    assert NETWORKS[name].waits <= max(2 * len(statistics), 1)
    assert NETWORKS[name].waits >= 1.5 * len(statistics)


def rows(tmp_path, *flags):
    output = tmp_path / "rows.json"
    arguments = ["scale_on_paper", f"--output={output}", *flags]
    paper.main(cli.parse(arguments, paper.define, ""))
    return {row["case"]: row for row in json.loads(output.read_text())}


def test_published_efficiencies_between_nodes_lie_within_the_bounds(tmp_path, capsys):
    found, shown = rows(tmp_path), capsys.readouterr().out
    for case, published in (("resnet50, 8 to 256", 90), ("vgg16, 1 to 512", 68)):
        row = found[f"check/{case}"]
        assert row["ours"] < published < row["peer"]
        assert f"published: {published} %" in shown


def test_the_page_has_the_numbers_that_the_script_computes(tmp_path):
    page = (ROOT / "docs/scaling.md").read_text()
    full, half = rows(tmp_path), rows(tmp_path, "--share=0.5")
    for key, found, start in (
        ("A100, ResNet-50", full, "ResNet-50, A100"),
        ("A100, ResNet-50", half, "the same"),
        ("P100, VGG-16", full, "VGG-16, P100, 64"),
        ("2 CPU cores, cifar10_cnn", full, "`cifar10_cnn`, 2 CPU"),
    ):
        line = re.search(rf"^\| {re.escape(start)}.*$", page, re.M)[0]
        shown = [float(x) for pair in re.findall(PAIR, line) for x in pair]
        want = [
            found[f"{key}/{devices}"][side]
            for devices in paper.COUNTS
            for side in ("ours", "peer")
        ]
        assert shown == pytest.approx(want, abs=0.051), start


def test_what_is_not_measured_yet_is_left_out(tmp_path):
    found = rows(tmp_path)
    for key, speed in paper.MEASURED.items():
        assert (f"{key}/8" in found) == bool(speed.per_second)
    assert {on for _, on in paper.CASES} <= set(MACHINES)
