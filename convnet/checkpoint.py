"""Checkpoints with Orbax: saved in the background, atomic, verified when restored."""

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies
from tqdm import tqdm

from convnet import mesh as mesh_lib
from convnet import processes
from convnet.errors import ConvnetError
from convnet.step import TrainState

_SEAL = "about/sha256"


def flat(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by their paths, "base/stem/conv/kernel", sorted."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
    }
    return dict(sorted(named.items()))


def sha256(tree: Any) -> str:
    """Returns the hash of each leaf's path, shape, dtype and bytes, in sorted order.

    All processes call together.
    """
    digest = hashlib.sha256()
    for path, leaf in flat(mesh_lib.fetch(tree)).items():
        leaf = np.ascontiguousarray(leaf)
        digest.update(f"{path} {leaf.shape} {leaf.dtype}\n".encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()


def result_sha256(state: TrainState) -> str:
    """Returns `params/sha256`: params, batch statistics and EMA where there is one."""
    tree = {"params": state.params, "batch_stats": state.batch_stats}
    return sha256(tree if state.ema is None else {**tree, "ema": state.ema})


def _seal(about: dict[str, Any]) -> str:
    """The hash of the values that are kept with a state."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _score(metrics: dict[str, float]) -> float:
    return metrics.get("score", -math.inf)


def _move(folder: Path, aside: Path) -> str:
    """Process 0 moves a folder; returns what went wrong, "" if nothing."""
    if not processes.leads():
        return ""
    try:
        aside.parent.mkdir(exist_ok=True)
        if aside.exists():
            shutil.rmtree(aside)
        # Not `rename`: checkpoints may lie on another disk.
        shutil.move(folder, aside)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _drop_broken_scores(folder: Path) -> None:
    """Orbax reads all scores when it opens a folder, and would fail for one of them."""
    for path in folder.glob("*/metrics/metrics"):
        try:
            json.loads(path.read_text())
        except ValueError:
            path.unlink()


class Checkpoints:
    """The folder `checkpoints/` of a run: the newest n and the best one.

    Each holds the state, its hash, and a few plain values. Without `keep` they are only
    read: nothing in the folder changes.
    """

    def __init__(self, folder: Path, keep: int | None) -> None:
        self.folder = folder.absolute()
        if keep is None:
            self._manager = ocp.CheckpointManager(
                self.folder, options=ocp.CheckpointManagerOptions(read_only=True)
            )
            return
        if processes.leads():
            _drop_broken_scores(self.folder)
        processes.wait()
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(keep),
                        policies.BestN(
                            get_metric_fn=_score,
                            n=1,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
                # With it scores are written to disk too, for the next start.
                best_fn=_score,
                save_decision_policy=policies.FixedIntervalPolicy(1),
                cleanup_tmp_directories=True,
            ),
        )

    def steps(self) -> list[int]:
        """Returns the steps that are saved, in order."""
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, state: TrainState, about: dict[str, Any], score: float | None
    ) -> None:
        """Starts to save; the rest happens in the background.

        Args:
          step: number of updates done.
          state: the state, not yet donated.
          about: plain values kept with the state: best score so far, seconds.
          score: this state's score (higher is better), None if not evaluated.

        Raises:
          ConvnetError: this or the previous save failed; names the last good one.
        """
        if step in self._manager.all_steps():
            return
        about = {**about, "sha256": sha256(state), "step": step}
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(flat(state)),
                    about=ocp.args.JsonSave({**about, _SEAL: _seal(about)}),
                ),
                metrics=None if score is None else {"score": float(score)},
                force=True,
            )
        except Exception as error:  # Orbax and TensorStore raise many kinds.
            raise self._failed(error) from error

    def wait(self) -> None:
        """Waits until all is on disk.

        Raises:
          ConvnetError: it could not be written; names the last good one.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # Orbax and TensorStore raise many kinds.
            raise self._failed(error) from error

    def close(self) -> None:
        """Releases the folder; `wait` comes before."""
        self._manager.close()

    def _failed(self, error: Exception) -> ConvnetError:
        good = self.steps()
        last = f"step {good[-1]}" if good else "none"
        # TensorStore nests messages; the cause stands at the end.
        reason = " ".join(str(error).split())[-120:]
        return ConvnetError(
            f"a checkpoint could not be written to {self.folder}: ...{reason}\n"
            f"the last good checkpoint is: {last}; make room or choose another"
            " --workdir, and run the same command again"
        )

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Restores the newest checkpoint that is whole.

        A corrupt one is moved to `corrupt/` beside the folder, with a warning, and the
        one before is taken.

        Args:
          state: gives structure, shapes, dtypes and shardings.

        Returns:
          The state, and `about` with `step`, or None if there is no checkpoint.

        Raises:
          ConvnetError: there are checkpoints, and none is whole; or a corrupt one
            cannot be moved.
        """
        steps = processes.tell(self.steps())
        for step in reversed(steps):
            found, reason = None, ""
            try:
                found = self.read(step, state)
            except Exception as error:  # Whatever a damaged file can raise.
                reason = " ".join(str(error).split())[:200] or type(error).__name__
            reasons = [other for other in processes.gather(reason) if other]
            if not reasons:
                return found
            corrupt = f"checkpoint {step} is corrupt ({reasons[0]})"
            aside = self._set_aside(step, corrupt)
            tqdm.write(f"warning: {corrupt}; moved to {aside}, trying the one before")
        if steps:
            raise ConvnetError(
                f"no checkpoint in {self.folder} can be read; to train from the start,"
                " run the same command again"
            )
        return None

    def read(self, step: int, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads one checkpoint; arguments and results are those of `restore`.

        Raises:
          ConvnetError: its content does not match its hash.
          Exception: whatever a damaged file makes Orbax and TensorStore raise.
        """
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, flat(state))
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(like), about=ocp.args.JsonRestore()
            ),
        )
        paths = jax.tree_util.tree_map_with_path(
            lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"),
            state,
        )
        restored = jax.tree.map(found["state"].__getitem__, paths)
        about = found["about"]
        # Older ones have no seal.
        seal = about.pop(_SEAL, None)
        if sha256(restored) != about["sha256"] or seal not in (None, _seal(about)):
            raise ConvnetError("its content does not match its hash")
        if about["step"] != step:
            raise ConvnetError(f"it is that of step {about['step']}")
        return restored, about

    def _set_aside(self, step: int, corrupt: str) -> Path:
        aside = self.folder.parent / "corrupt" / str(step)
        error = processes.tell(_move(self.folder / str(step), aside))
        if error:
            raise ConvnetError(
                f"{corrupt}, and cannot be moved from {self.folder} to {aside}:"
                f" {error}; move or remove it, and run the same command again"
            )
        self._manager.reload()
        return aside
