"""The learning-rate range test (Smith 2015, arXiv:1506.01186, section 3.3).

The rate grows exponentially from step to step of the real training: the experiment's
own step, recipe, order of the data and optimizer, from the initial weights. Where the
loss begins to fall and where it explodes bound the rates that train.
"""

import dataclasses
import io
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.typing import ArrayLike
from tqdm import tqdm

from convnet import files, optim
from convnet import mesh as mesh_lib
from convnet import step as step_lib
from convnet.errors import UsageError
from convnet.prepare import Run, initial_state, prepare
from convnet.workdir import Workdir

# From a thousandth to a thousand times optimizer.lr.
_SPAN = 1e3
# Steps of a test: fewer where batches are large, so that a CPU is soon done.
_MOST_STEPS = 100
_LEAST_STEPS = 30
_EXAMPLES = 20_000
# The loss has exploded when its running mean is above what it began with, and above so
# many times its lowest.
_EXPLODED = 4.0
_RUNNING = 0.8
# By less than this share of what it began with, the loss has not fallen.
_LEAST_FALL = 0.05
# The suggested rate, as a share of that of the lowest loss.
_SHARE = 0.1
# The spread of the smoothing, as a share of all steps.
_SMOOTHING = 1 / 40

RULE = "a tenth of the rate at which the smoothed loss was lowest"


@dataclasses.dataclass(frozen=True)
class Found:
    """What a range test found; rates are those of optimizer.lr.

    Attributes:
      rates: of each step, (steps,).
      losses: the minimised loss before each update, (steps,).
      smoothed: the losses, capped at what they began with and smoothed, (steps,).
      lowest: the rate of the lowest smoothed loss.
      steepest: the rate at which the smoothed loss fell fastest, at or before `lowest`.
      exploded: the rate at which the test stopped, None if it did not have to.
      suggestion: by `RULE`, two digits of it; None where the loss never fell.
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    lowest: float
    steepest: float
    exploded: float | None
    suggestion: float | None


def ramp(lr: float, steps: int) -> tuple[np.ndarray, optim.Schedule]:
    """Returns the rates of a test around `lr`, float32 (steps,), and their schedule.

    Each is the same factor times the one before.
    """
    rates = np.geomspace(lr / _SPAN, lr * _SPAN, steps).astype(np.float32)

    def schedule(step: ArrayLike) -> jax.Array:
        return jnp.asarray(rates)[step]

    return rates, schedule


def steps_of(batch_size: int) -> int:
    """Returns how many steps a test has at most."""
    return min(max(_EXAMPLES // batch_size, _LEAST_STEPS), _MOST_STEPS)


def measure(it: Run, steps: int) -> np.ndarray:
    """Trains until the loss explodes, at most `steps` steps; returns their losses.

    Args:
      it: as prepared, with the ramp for its schedule.
      steps: of the ramp.

    Returns:
      The minimised loss before each update, float64; finite but for the last.
    """
    split = it.split("train")
    state, train = initial_state(it), None
    losses: list[float] = []
    running = lowest = 0.0
    batches = split.batches(it.train_order, 0, steps)
    # Shown where there is a terminal.
    for batch in tqdm(batches, total=steps, unit="step", disable=None):
        if train is None:
            train = it.compile(
                step_lib.train_step,
                state,
                split.data,
                batch,
                recipe=it.recipe,
                donate_argnums=0,
                out_shardings=it.out_shardings(),
            )
        state, metrics = train(state, split.data, batch)
        losses.append(float(metrics["objective"]))
        share = _RUNNING if len(losses) > 1 else 0.0
        running = share * running + (1 - share) * losses[-1]
        lowest = min(lowest, running) if share else running
        # Written so that NaN ends it too.
        if not running <= max(losses[0], _EXPLODED * lowest):
            break
    return np.asarray(losses)


def analyse(rates: np.ndarray, losses: np.ndarray) -> Found:
    """Reads a suggestion off a test.

    Args:
      rates: of all steps of the ramp, (n,).
      losses: of the steps that were taken, (m,), m <= n; the last may not be finite.
    """
    exploded = None
    if len(losses) < len(rates) or not np.isfinite(losses[-1]):
        exploded = float(rates[len(losses) - 1])
    steps, spread = len(rates), max(len(rates) * _SMOOTHING, 1.0)
    losses = losses[np.isfinite(losses)]
    rates = rates[: len(losses)]
    if len(losses) < 3:
        return Found(rates, losses, losses, math.nan, math.nan, exploded, None)
    # What it began with: of a few steps, in which the rate is too low to matter.
    start = float(losses[: max(3, steps // 20)].mean())
    place = np.arange(len(losses))
    weights = np.exp(-0.5 * ((place[:, None] - place) / spread) ** 2)
    # Capped, so that an explosion does not reach back to where the loss was lowest.
    smoothed = weights @ np.minimum(losses, start) / weights.sum(1)
    bottom = int(smoothed.argmin())
    slope = np.gradient(smoothed)
    steep = int(slope[: bottom + 1].argmin())
    suggestion = None
    if smoothed[bottom] < (1 - _LEAST_FALL) * smoothed[0]:
        suggestion = float(f"{_SHARE * rates[bottom]:.2g}")
    return Found(
        rates,
        losses,
        smoothed,
        float(rates[bottom]),
        float(rates[steep]),
        exploded,
        suggestion,
    )


def run(config: ml_collections.ConfigDict, path: Path) -> Found:
    """Tests, writes find_lr.json and find_lr.png into a workdir, and says what to set.

    A run in the same workdir, before or after, is not touched.

    Args:
      config: the experiment; filled in as `prepare` does. `schedule` and the length of
        the run do not count.
      path: the workdir.

    Raises:
      UsageError: optimizer.lr is 0.
      ConvnetError: the data or the model of init_from cannot be used.
    """
    lr = config.optimizer.lr
    if not lr > 0:
        raise UsageError(f"optimizer.lr is {lr:g}: --find_lr looks around it; set one")
    # A pass over all data would take longer than the test.
    config.transfer.cache_features = "off"
    workdir = Workdir(path)
    workdir.adopt(config)
    steps = steps_of(config.data.batch_size)
    rates, schedule = ramp(lr, steps)
    it = prepare(config, schedule)
    workdir.create()
    print(
        f"learning-rate range test on {mesh_lib.describe(it.mesh)}: at most {steps}"
        f" steps of {config.data.batch_size} examples, from {rates[0]:.3g} to"
        f" {rates[-1]:.3g}",
        flush=True,
    )
    start = time.perf_counter()
    found = analyse(rates, measure(it, steps))
    seconds = time.perf_counter() - start
    suggested = flags_of(config, found.suggestion)
    about = {
        "rule": RULE,
        "suggestion": suggested,
        "configured": lr,
        "lowest": found.lowest,
        "steepest": found.steepest,
        "exploded": found.exploded,
        "seconds": seconds,
        "seed": config.seed,
        "rates": found.rates.tolist(),
        "losses": found.losses.tolist(),
        "smoothed": found.smoothed.tolist(),
    }
    plain = {k: None if v != v else v for k, v in about.items()}  # JSON has no NaN.
    workdir.write_json("find_lr.json", plain)
    files.write(path / "find_lr.png", plot(found, lr))
    print(describe(found, config, steps, seconds))
    print(f"plot: {path / 'find_lr.png'}; numbers: {path / 'find_lr.json'}")
    return found


def flags_of(
    config: ml_collections.ConfigDict, rate: float | None
) -> dict[str, float] | None:
    """Returns the keys that set a rate: muon's other rates grow with optimizer.lr."""
    if rate is None:
        return None
    keys = {"optimizer.lr": rate}
    if config.optimizer.name == "muon":
        for name in ("head_lr", "bias_lr"):
            value = config.optimizer[name] * rate / config.optimizer.lr
            keys[f"optimizer.{name}"] = float(f"{value:.2g}")
    return keys


def describe(
    found: Found, config: ml_collections.ConfigDict, steps: int, seconds: float
) -> str:
    """Returns what was found, in words, and the flags that set it."""
    taken = len(found.rates)
    if found.suggestion is None:
        way = "lower" if found.exploded else "higher"
        return (
            f"no suggestion: the loss never fell below what it began with, in {taken}"
            f" steps; set optimizer.lr (now {config.optimizer.lr:g}) {way} and test"
            " again"
        )
    end = "it did not explode"
    if found.exploded:
        end = f"it exploded at {found.exploded:.2g}"
    lines = [
        f"{taken} steps, {seconds:.0f} s: the loss fell fastest at"
        f" {found.steepest:.2g} and was lowest ({found.smoothed.min():.3g}) at"
        f" {found.lowest:.2g}; {end}"
    ]
    if found.lowest == found.rates[-1] and taken == steps:
        lines.append(
            "it was still falling at the highest rate: set optimizer.lr higher and"
            " test again"
        )
    flags = flags_of(config, found.suggestion) or {}
    shown = " ".join(f"--config.{name}={value:g}" for name, value in flags.items())
    lines.append(f"suggestion, {RULE} (now {config.optimizer.lr:g}):\n  {shown}")
    return "\n".join(lines)


def plot(found: Found, configured: float) -> bytes:
    """Returns the losses over the rates as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(found.rates, found.losses, color="0.75", linewidth=1, label="loss")
    axes.plot(found.rates, found.smoothed, color="C0", linewidth=2, label="smoothed")
    axes.set_xscale("log")
    marks = [
        ("steepest", found.steepest, "C2", ":"),
        ("lowest", found.lowest, "C1", ":"),
        ("configured", configured, "0.4", "--"),
    ]
    if found.suggestion is not None:
        marks.append(("suggestion", found.suggestion, "C3", "-"))
    for name, rate, colour, style in marks:
        if math.isfinite(rate):
            label = f"{name}: {rate:.2g}"
            axes.axvline(rate, color=colour, linestyle=style, label=label)
    if len(found.losses):
        # What follows an explosion would squash all else.
        low, high = float(found.losses.min()), float(found.smoothed.max())
        room = max(high - low, 1e-6 * abs(high), 1e-12)
        axes.set_ylim(low - 0.1 * room, high + 0.4 * room)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss of the step's batch")
    axes.legend(loc="upper left", fontsize="small")
    axes.grid(alpha=0.3)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()
