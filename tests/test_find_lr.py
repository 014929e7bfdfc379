"""The learning-rate range test, on problems whose answer is known."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

from convnet import config as config_lib
from convnet import find_lr, prepare, train
from convnet.errors import UsageError
from convnet.models import layers

PROJECT = Path(__file__).resolve().parent.parent
EXAMPLES = 64
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Numbers that are a linear function of two channels of a series, and noise."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(EXAMPLES, 3, 2)).astype(np.float32)
    y = x.reshape(EXAMPLES, 6) @ rng.normal(size=6) + 0.5 * rng.normal(size=EXAMPLES)
    y = y.astype(np.float32)
    path = tmp_path_factory.mktemp("find_lr") / "data.npz"
    np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
    return path


def linear(data, lr, momentum=0.0):
    """Least squares by gradient descent: each step sees all of the data."""
    config = config_lib.default()
    config.data.name, config.data.dir = "arrays", str(data)
    config.data.batch_size = EXAMPLES
    config.data.mean, config.data.std = (0.0,), (1.0,)
    config.model.widths, config.model.depth = (4,), 1
    config.task.name = "regression"
    config.optimizer.lr, config.optimizer.momentum = lr, momentum
    config.optimizer.nesterov = False
    config.compilation_cache = "none"
    return config


class Flat(nn.Module):
    """No base: all values of the input are features."""

    @nn.compact
    def __call__(self, x, train=False):
        return x.reshape(len(x), -1)


def prepare_linear(config, schedule):
    it = prepare.prepare(config, schedule)
    model = layers.Classifier(Flat(), layers.Head(1))
    it.recipe = dataclasses.replace(it.recipe, model=model)
    return it


def matrix(data):
    """Inputs with a column of ones, the labels, and the largest curvature."""
    with np.load(data) as file:
        x, y = (file[name].astype(np.float64) for name in ("x_train", "y_train"))
    x = np.column_stack([x.reshape(EXAMPLES, 6), np.ones(EXAMPLES)])
    return x, y, np.linalg.eigvalsh(2 / EXAMPLES * x.T @ x).max()


def test_rates_grow_by_the_same_factor_around_the_configured_one():
    rates, schedule = find_lr.ramp(0.2, 100)
    assert rates[0] == np.float32(0.2e-3) and rates[-1] == np.float32(0.2e3)
    factors = rates[1:].astype(np.float64) / rates[:-1]
    np.testing.assert_allclose(factors, 10 ** (6 / 99), rtol=1e-6)
    found = [schedule(step) for step in range(100)]
    np.testing.assert_array_equal(found, rates)


@pytest.mark.parametrize(("batch", "steps"), [(1, 100), (250, 80), (2000, 30)])
def test_large_batches_make_fewer_steps(batch, steps):
    assert find_lr.steps_of(batch) == steps


def test_each_step_is_gradient_descent_at_its_rate(data):
    """Against NumPy, with momentum, to where it explodes."""
    config = linear(data, 0.05, momentum=0.9)
    rates, schedule = find_lr.ramp(0.05, 60)
    it = prepare_linear(config, schedule)
    losses = find_lr.measure(it, 60)
    assert 20 < len(losses) < 60
    x, y, _ = matrix(data)
    start = prepare.initial_state(it).params["head"]["logits"]
    w = np.append(np.asarray(start["kernel"], np.float64)[:, 0], start["bias"])
    buffer, wanted = np.zeros(7), []
    for rate in rates[: len(losses)].astype(np.float64):
        residual = x @ w - y
        wanted.append((residual**2).mean())
        buffer = 0.9 * buffer + 2 / EXAMPLES * x.T @ residual
        w = w - rate * buffer
    np.testing.assert_allclose(losses, wanted, rtol=2e-3)
    # It stops where the loss explodes, no sooner and not much later.
    assert losses[-1] > losses[0] > losses[-9]


def test_the_limit_of_stability_is_found(data, tmp_path, monkeypatch):
    """Gradient descent diverges from 2 / curvature on, and is fastest near it."""
    _, _, curvature = matrix(data)
    limit = 2 / curvature
    monkeypatch.setattr(find_lr, "prepare", prepare_linear)
    found = find_lr.run(linear(data, 0.02), tmp_path)
    again = find_lr.run(linear(data, 0.02), tmp_path)
    np.testing.assert_array_equal(found.losses, again.losses)
    assert limit < found.exploded < 8 * limit
    assert limit / 8 < found.lowest < 3 * limit
    assert found.suggestion < found.steepest * 4 and found.suggestion < limit / 2


def curve(decades, bottom=0.2, fell=-2.0, explodes=0.0):
    """Losses that fall from 1 around 10**fell and rise again from 10**explodes on."""
    loss = bottom + (1 - bottom) / (1 + np.exp(4 * (decades - fell)))
    return loss + np.maximum(decades - explodes, 0) ** 2 * 3


def test_a_suggestion_is_read_off_a_noisy_curve():
    decades = np.linspace(-4, 1, 100)
    noise = 0.03 * np.random.default_rng(0).normal(size=100)
    found = find_lr.analyse(10**decades, curve(decades) + noise)
    assert -2.3 < np.log10(found.steepest) < -1.7
    assert -1.2 < np.log10(found.lowest) < 0.2
    assert found.suggestion == pytest.approx(found.lowest / 10, rel=0.06)
    assert found.exploded is None
    # An explosion in the next step does not move what came before it.
    stop = np.searchsorted(decades, 0.1)
    losses = np.append(curve(decades[:stop]), np.nan)
    cut = find_lr.analyse(10**decades, losses)
    assert cut.exploded == 10 ** decades[stop]
    assert np.isfinite(cut.smoothed).all() and len(cut.rates) == stop
    losses[-1] = 1e9
    huge = find_lr.analyse(10**decades, losses)
    assert huge.lowest == pytest.approx(cut.lowest, rel=0.2)


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        (np.geomspace(1, 50, 40), "set optimizer.lr (now 0.1) lower"),
        (np.array([2.0, np.nan]), "set optimizer.lr (now 0.1) lower"),
        (np.ones(100), "set optimizer.lr (now 0.1) higher"),
        (np.linspace(2, 1, 100), "still falling at the highest rate"),
    ],
    ids=["only rose", "not finite at once", "never moved", "fell to the end"],
)
def test_what_is_no_valley_is_said(losses, words, tmp_path):
    config = config_lib.default()
    rates, _ = find_lr.ramp(config.optimizer.lr, 100)
    found = find_lr.analyse(rates, losses)
    assert words in find_lr.describe(found, config, 100, 1.0)
    if "falling" not in words:
        assert found.suggestion is None
    assert find_lr.plot(found, 0.1).startswith(b"\x89PNG")


def test_a_rate_of_zero_is_refused(data, tmp_path):
    with pytest.raises(UsageError, match="optimizer.lr is 0"):
        find_lr.run(linear(data, 0.0), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_muon_s_rates_are_suggested_together():
    config = config_lib.default()
    config.optimizer.name, config.optimizer.lr = "muon", 0.2
    config.optimizer.head_lr, config.optimizer.bias_lr = 1000.0, 50.0
    assert find_lr.flags_of(config, 0.04) == {
        "optimizer.lr": 0.04,
        "optimizer.head_lr": 200.0,
        "optimizer.bias_lr": 10.0,
    }


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """`--find_lr` as a person starts it: the workdir and what was printed."""
    workdir = tmp_path_factory.mktemp("digits") / "run"
    command = [sys.executable, "-m", "convnet.main", *DIGITS, "--find_lr"]
    done = subprocess.run(
        [*command, f"--workdir={workdir}"],
        cwd=PROJECT,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


DIGITS = (
    "--config=experiments/digits.py",
    "--config.model.widths=(8,)",
    "--config.model.depth=1",
    "--config.model.norm=none",
    "--config.model.dropout=0.0",
    "--config.optimizer.name=sgd",
    "--config.optimizer.lr=0.01",
    *(f"--config.augment.{name}=0.0" for name in ("rotate", "translate", "zoom")),
)


def digits_config(lr):
    config = config_lib.default()
    config.model.widths, config.model.depth = (8,), 1
    config.model.norm, config.model.dense = "none", (64,)
    config.optimizer.lr, config.optimizer.weight_decay = lr, 1e-2
    config.schedule.name = "constant"
    config.train.steps, config.train.eval_every = 80, 0.0
    config.compilation_cache = "none"
    return config


def test_the_suggestion_trains_in_the_same_workdir(digits):
    workdir, printed = digits
    found = json.loads((workdir / "find_lr.json").read_text())
    assert {p.name for p in workdir.iterdir()} == {"find_lr.json", "find_lr.png"}
    rates, losses = np.array(found["rates"]), np.array(found["losses"])
    assert rates[0] == pytest.approx(1e-5) and len(rates) == len(losses) > 40
    # Ten digits: it begins with what guessing costs.
    assert losses[0] == pytest.approx(np.log(10), abs=0.8)
    suggestion = found["suggestion"]["optimizer.lr"]
    assert f"--config.optimizer.lr={suggestion:g}" in printed
    with Image.open(workdir / "find_lr.png") as picture:
        assert picture.size == (960, 540)
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3))) > 20
    result = train.run(digits_config(suggestion), workdir, "command")
    assert result["step"] == 80 and result["test/accuracy"] > 0.9
    # Far below it, the same steps learn much less.
    constant = prepare.prepare(digits_config(0.1), lambda step: jnp.float32(1e-5))
    assert find_lr.measure(constant, 80)[-10:].mean() > 2


def test_ten_times_the_explosion_diverges(digits):
    found = json.loads((digits[0] / "find_lr.json").read_text())
    rate = 10 * found["exploded"]
    it = prepare.prepare(digits_config(0.1), lambda step: jnp.float32(rate))
    losses = find_lr.measure(it, 80)
    assert len(losses) < 20 and not losses[-1] < 4 * losses[0]
