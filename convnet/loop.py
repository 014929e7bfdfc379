"""The training loop: step, log, evaluate, save, from one step to the last."""

import collections
import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from convnet import checkpoint, evaluate, processes, together
from convnet import mesh as mesh_lib
from convnet import step as step_lib
from convnet.checkpoint import Checkpoints
from convnet.cli import Interrupted
from convnet.data import pipeline
from convnet.errors import ConvnetError
from convnet.prepare import Run
from convnet.progress import Progress, Signals
from convnet.workdir import Workdir

# How many steps may be under way before the loop waits: enough to keep a device busy,
# few enough that Ctrl-C is answered soon.
_STEPS_AHEAD = {"cpu": 2}
_STEPS_AHEAD_ELSEWHERE = 32
# On an accelerator as many steps go into one program as the loop may leave alone. On a
# CPU a loop around a step gains little, and is many times slower on JAX 0.10.
_MOST_STEPS_TOGETHER = 100


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
        # Metrics of the last steps: still on the device, then since the last log line.
        self._pending: collections.deque[dict[str, jax.Array]] = collections.deque()
        self._unlogged: list[dict[str, np.ndarray]] = []
        self._waited = 0.0
        self._logged_seconds = it.train_seconds
        self._compiled: dict[tuple[int, int], Any] = {}
        self._dispatched = 0
        self._doing, self._waiting = together.ANYTHING, together.STARTING

    def run(self) -> None:
        """Runs to the last step.

        Raises:
          Interrupted: SIGINT or SIGTERM came; the state is saved.
          ConvnetError: the loss is not finite, a checkpoint cannot be written, or too
            many images cannot be read.
        """
        it = self._it
        self._progress = Progress(self._start, it.total_steps)
        dispatches = self._dispatches(it.total_steps)
        with Signals(processes.several()) as signals, together.watched(self._state):
            try:
                # Off the clock: opening the data, starting workers.
                dispatch = next(dispatches, None)
                self._clock = time.perf_counter()
                while dispatch is not None:
                    steps, batch = dispatch
                    train = self._train(steps, batch)
                    self._doing = self._waiting
                    it.state, metrics = train(it.state, it.split("train").data, batch)
                    self._count(steps, metrics)
                    # Before anything waits for the step: the next one is prepared
                    # while the devices compute.
                    self._doing = "reading the data"
                    dispatch = self._next(dispatches)
                    self._doing = together.ANYTHING
                    self._after_step(steps, signals)
            finally:
                dispatches.close()
                self._progress.close()

    def _state(self) -> tuple[int, str]:
        return self._done, self._doing

    def replay(self, stop: int) -> None:
        """Trains to step `stop`, without a log, an evaluation or a checkpoint."""
        it, self._clock = self._it, 0.0
        with contextlib.closing(self._dispatches(stop)) as dispatches:
            while self._done < stop:
                steps, batch = next(dispatches)
                train = self._train(steps, batch)
                it.state, metrics = train(it.state, it.split("train").data, batch)
                jax.block_until_ready(metrics)
                self._done += steps

    def _dispatches(self, end: int) -> Iterator[tuple[int, Any]]:
        """Yields how many steps go together until `end`, and their batch or stack.

        Where one ends depends on the step alone, not on where a run was resumed.
        """
        it = self._it
        split = it.split("train")
        together = self._steps_together(split)
        if together == 1:
            for batch in split.batches(it.train_order, self._start, end):
                yield 1, batch
            return
        start = self._start
        while start < end:
            stop = start + 1
            while (
                stop % together
                and stop < end
                and stop not in it.later
                and not any(self._due(stop, stop - 1))
            ):
                stop += 1
            if stop - start > 1:
                yield stop - start, split.stack(it.train_order, start, stop)
            else:
                yield 1, next(split.batches(it.train_order, start, stop))
            start = stop

    def _steps_together(self, split: pipeline.Split) -> int:
        if not split.data:  # streamed
            return 1
        if self._config.train.steps_per_dispatch:
            return self._config.train.steps_per_dispatch
        if jax.default_backend() == "cpu":
            return 1
        epoch = self._it.train_order.examples // self._config.data.batch_size
        return min(max(epoch, 1), _MOST_STEPS_TOGETHER)

    def _next(self, dispatches: Iterator[tuple[int, Any]]) -> tuple[int, Any] | None:
        """Clocks the waiting for input."""
        start = time.perf_counter()
        dispatch = next(dispatches, None)
        # While the last step is still running, the devices do not wait.
        if not self._pending or self._pending[-1]["count"].is_ready():
            self._waited += time.perf_counter() - start
        return dispatch

    def _train(self, steps: int, batch: Any) -> Any:
        """The compiled program of so many steps, off the clock of training."""
        it = self._it
        recipe = it.recipe_of(self._done)
        key = steps, id(recipe)
        if key not in self._compiled:
            jax.block_until_ready(it.state)  # Steps under way belong on the clock.
            start = time.perf_counter()
            self._compiled[key] = it.compile(
                step_lib.train_step if steps == 1 else step_lib.train_steps,
                it.state,
                it.split("train").data,
                batch,
                recipe=recipe,
                donate_argnums=0,
                out_shardings=it.out_shardings(),
            )
            self._clock += time.perf_counter() - start
        return self._compiled[key]

    def _count(self, steps: int, metrics: dict[str, jax.Array]) -> None:
        self._pending.append(metrics)
        self._done += steps
        self._progress.advance(steps)
        ahead = _STEPS_AHEAD.get(jax.default_backend(), _STEPS_AHEAD_ELSEWHERE)
        ahead = max(ahead // steps, 1)
        if len(self._pending) > ahead:
            jax.block_until_ready(self._pending[-1 - ahead])
            self._waiting = together.WAITING

    def _due(self, done: int, before: int) -> tuple[bool, bool]:
        """Whether to evaluate, and whether to save, after step `done`."""
        last = done == self._it.total_steps
        every = self._config.checkpoint.every_steps
        evaluates = last or self._passes(
            self._epoch_of(done), self._epoch_of(before), self._config.train.eval_every
        )
        return evaluates, evaluates or self._passes(done, before, every)

    def _after_step(self, steps: int, signals: Signals) -> None:
        before = self._done - steps
        evaluates, saves = self._due(self._done, before)
        self._dispatched += 1
        signum = processes.stop_signal(signals.received, self._dispatched)
        interrupted = signum is not None and self._done < self._it.total_steps
        logs = self._passes(self._done, before, self._config.train.log_every)
        if logs or saves or interrupted:
            self._flush(saves or interrupted)
        if evaluates or saves or interrupted:
            self._check_state()
        score = self._evaluate() if evaluates else None
        if evaluates or saves:
            for split in self._it.splits.values():
                split.bad.share()
        if saves or interrupted:
            self._save(score)
        if interrupted:
            self._checkpoints.wait()
            raise Interrupted(
                signum,
                f"stopped at step {self._done} of {self._it.total_steps}, saved;"
                " the same command goes on from there",
                agreed=True,
            )
        if evaluates or saves:
            self._clock = time.perf_counter()

    def _epoch_of(self, done: int) -> float:
        return done * self._config.data.batch_size / self._it.train_order.examples

    def _passes(self, now: float, before: float, every: float) -> bool:
        """Whether a multiple of `every` was passed (0: never)."""
        return bool(every) and math.floor(now / every) > math.floor(before / every)

    def _flush(self, whole: bool) -> None:
        """Fetches the pending metrics, checks them, writes their lines.

        A line ends at each multiple of train.log_every, however many steps went
        together; with `whole` also at the last step.

        Raises:
          ConvnetError: a loss was NaN or infinite.
        """
        it = self._it
        rows = _rows(jax.device_get(list(self._pending)))
        self._pending.clear()
        now = time.perf_counter()
        it.train_seconds += now - self._clock
        self._clock = now
        if not rows:
            return
        seconds = max(it.train_seconds - self._logged_seconds, 1e-9)
        speed = {
            "images_per_second": len(rows) * self._config.data.batch_size / seconds,
            "input_wait": min(self._waited / seconds, 1.0),
        }
        self._waited, self._logged_seconds = 0.0, it.train_seconds
        for step, row in enumerate(rows, self._done - len(rows) + 1):
            if not math.isfinite(row["objective"]):
                raise self._not_finite(f"the loss is {row['objective']}", step)
            self._unlogged.append(row)
            if step % self._config.train.log_every == 0 or (
                whole and step == self._done
            ):
                self._log(step, self._unlogged, speed)
                self._unlogged = []

    def _log(
        self, step: int, rows: list[dict[str, np.ndarray]], speed: dict[str, float]
    ) -> None:
        it = self._it
        count = sum(float(row["count"]) for row in rows)
        values = {
            f"train/{name}": sum(float(row[name]) for row in rows) / max(count, 1.0)
            for name in rows[0]
            if name not in ("count", "grad_norm", "objective")
        }
        values |= {
            "train/objective": sum(float(row["objective"]) for row in rows) / len(rows),
            "grad_norm": float(rows[-1]["grad_norm"]),
            "learning_rate": float(it.schedule(step - 1)),
            **speed,
            "epoch": self._epoch_of(step),
        }
        self._workdir.log(step, values)
        images = (it.total_steps - step) * self._config.data.batch_size
        self._progress.log(step, values, images / speed["images_per_second"])

    def _check_state(self) -> None:
        """Raises ConvnetError if the state holds NaN or infinity.

        A finite loss can have a gradient that is not: the next loss would tell, after
        the state has been saved.
        """
        for name, leaf in checkpoint.flat(mesh_lib.fetch(self._it.state)).items():
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


def _rows(fetched: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """One dict a step, of the metrics of single steps and of several, (steps,)."""
    rows = []
    for metrics in fetched:
        columns = {name: np.atleast_1d(value) for name, value in metrics.items()}
        for place in range(len(columns["count"])):
            rows.append({name: value[place] for name, value in columns.items()})
    return rows
