"""The training loop: step, log, evaluate, save, from one step to the last."""

import collections
import itertools
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from convnet import checkpoint, evaluate
from convnet import mesh as mesh_lib
from convnet import step as step_lib
from convnet.checkpoint import Checkpoints
from convnet.cli import Interrupted
from convnet.errors import ConvnetError
from convnet.prepare import Run
from convnet.progress import Progress, Signals
from convnet.workdir import Workdir

# How many steps may be under way before the loop waits: enough to keep a device busy,
# few enough that Ctrl-C is answered soon.
_STEPS_AHEAD = {"cpu": 2}


class Loop:
    """Trains `it.state` from step `start` to `it.total_steps`."""

    def __init__(
        self, it: Run, start: int, checkpoints: Checkpoints, workdir: Workdir
    ) -> None:
        self._it = it
        self._config = it.config
        self._start = self._done = start
        self._checkpoints = checkpoints
        self._workdir = workdir
        # Metrics of the steps since the last log line, still on the device.
        self._pending: collections.deque[dict[str, jax.Array]] = collections.deque()
        self._waited = 0.0
        self._logged_seconds = it.train_seconds

    def run(self) -> None:
        """Runs to the last step.

        Raises:
          Interrupted: SIGINT or SIGTERM came; the state is saved.
          ConvnetError: the loss is not finite, a checkpoint cannot be written, or too
            many images cannot be read.
        """
        it = self._it
        split = it.split("train")
        batches = split.batches(it.train_order, self._start, it.total_steps)
        first = next(batches)
        train = it.compile(
            step_lib.train_step,
            it.state,
            split.data,
            first,
            donate_argnums=0,
            out_shardings=mesh_lib.replicated(it.mesh),
        )
        self._progress = Progress(self._start, it.total_steps)
        with Signals() as signals:
            try:
                batches = self._timed(itertools.chain([first], batches))
                for batch in batches:
                    it.state, metrics = train(it.state, split.data, batch)
                    self._count(metrics)
                    self._after_step(signals)
            finally:
                batches.close()
                self._progress.close()

    def _timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Clocks the waiting for input."""
        self._clock = time.perf_counter()
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def _count(self, metrics: dict[str, jax.Array]) -> None:
        self._pending.append(metrics)
        self._done += 1
        self._progress.advance()
        ahead = _STEPS_AHEAD.get(jax.default_backend(), 32)
        if len(self._pending) > ahead:
            jax.block_until_ready(self._pending[-1 - ahead])

    def _after_step(self, signals: Signals) -> None:
        last = self._done == self._it.total_steps
        evaluates = last or self._passes(self._epoch_of, self._config.train.eval_every)
        every = self._config.checkpoint.every_steps
        saves = evaluates or bool(every and self._done % every == 0)
        interrupted = signals.received is not None and not last
        if (
            evaluates
            or saves
            or interrupted
            or self._done % self._config.train.log_every == 0
        ):
            self._flush()
        if evaluates or saves or interrupted:
            self._check_state()
        score = self._evaluate() if evaluates else None
        if saves or interrupted:
            self._save(score)
        if interrupted:
            self._checkpoints.wait()
            raise Interrupted(
                signals.received,
                f"stopped at step {self._done} of {self._it.total_steps}, saved;"
                " the same command goes on from there",
            )
        if evaluates or saves:
            self._clock = time.perf_counter()

    def _epoch_of(self, done: int) -> float:
        return done * self._config.data.batch_size / self._it.train_order.examples

    def _passes(self, measure: Any, every: float) -> bool:
        """Whether this step took `measure` past a multiple of `every` (0: never)."""
        if not every:
            return False
        now, before = measure(self._done) / every, measure(self._done - 1) / every
        return math.floor(now) > math.floor(before)

    def _flush(self) -> None:
        """Fetches the pending metrics, checks them, writes a line.

        Raises:
          ConvnetError: a loss was NaN or infinite.
        """
        it = self._it
        rows = jax.device_get(list(self._pending))
        self._pending.clear()
        now = time.perf_counter()
        it.train_seconds += now - self._clock
        self._clock = now
        if not rows:
            return
        first = self._done - len(rows) + 1
        for place, row in enumerate(rows):
            if not math.isfinite(row["objective"]):
                what = f"the loss is {row['objective']}"
                raise self._not_finite(what, first + place)
        count = sum(float(row["count"]) for row in rows)
        seconds = max(it.train_seconds - self._logged_seconds, 1e-9)
        images = len(rows) * self._config.data.batch_size
        values = {
            f"train/{name}": sum(float(row[name]) for row in rows) / max(count, 1.0)
            for name in rows[0]
            if name not in ("count", "grad_norm", "objective")
        }
        values |= {
            "train/objective": sum(float(row["objective"]) for row in rows) / len(rows),
            "grad_norm": float(rows[-1]["grad_norm"]),
            "learning_rate": float(it.schedule(self._done - 1)),
            "images_per_second": images / seconds,
            "input_wait": min(self._waited / seconds, 1.0),
            "epoch": self._epoch_of(self._done),
        }
        self._waited, self._logged_seconds = 0.0, it.train_seconds
        self._workdir.log(self._done, values)
        left = (it.total_steps - self._done) * seconds / len(rows)
        self._progress.log(self._done, values, left)

    def _check_state(self) -> None:
        """Raises ConvnetError if the state holds NaN or infinity.

        A finite loss can have a gradient that is not: the next loss would tell, after
        the state has been saved.
        """
        for name, leaf in checkpoint.flat(jax.device_get(self._it.state)).items():
            if not np.isfinite(leaf).all():
                raise self._not_finite(f"{name} is not finite", self._done)

    def _not_finite(self, what: str, step: int) -> ConvnetError:
        self._checkpoints.wait()
        saved = self._checkpoints.steps()
        last = f"of step {saved[-1]}" if saved else "none"
        return ConvnetError(
            f"{what} at step {step}; the last good checkpoint: {last}\n"
            f"likely causes: optimizer.lr = {self._config.optimizer.lr:g} is too high"
            " (lower it, or set schedule.warmup or optimizer.clip_norm); inputs or"
            " labels out of range; model.dtype = bfloat16 where float32 is needed"
        )

    def _evaluate(self) -> float:
        """Evaluates the test split; returns the score, higher is better."""
        it = self._it
        variables = it.state.variables()
        split = it.split("test")
        it.predicted = evaluate.predict_split(
            it.predict, variables, split, self._config.data.batch_size
        )
        means = evaluate.means(it.predicted)
        self._workdir.log(self._done, {f"test/{k}": v for k, v in means.items()})
        shown = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        self._progress.line(
            f"step {self._done}/{it.total_steps}"
            f"  epoch {self._epoch_of(self._done):.1f}  test: {shown}"
        )
        score = means.get("accuracy", -means["loss"])
        return score

    def _save(self, score: float | None) -> None:
        it = self._it
        about = {"train_seconds": it.train_seconds}
        self._checkpoints.save(self._done, it.state, about, score)
