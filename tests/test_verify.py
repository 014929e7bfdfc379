"""Verify: what a run claims holds, and what was changed afterwards is found."""

import json
import shutil
from types import SimpleNamespace

import pytest

from convnet import bundle as bundle_lib
from convnet import config as config_lib
from convnet import train, verify
from convnet.errors import UsageError
from convnet.workdir import Workdir


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run, with checkpoints at steps 8, 10 and 12."""
    config = config_lib.default()
    config.data.train_limit, config.data.test_limit = 96, 32
    config.data.batch_size = 24
    config.model.widths, config.model.depth = (4,), 1
    config.optimizer.lr = 0.01
    config.optimizer.ema = 0.9
    config.train.epochs, config.train.eval_every = 3.0, 0.0
    config.checkpoint.every_steps, config.checkpoint.keep = 2, 3
    path = tmp_path_factory.mktemp("run") / "digits"
    train.run(config, path, "python -m convnet.main")
    return path


@pytest.fixture
def workdir(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "digits")


def run(capsys, **flags):
    values = SimpleNamespace(**{"workdir": None, "model": None, "replay": 1000} | flags)
    status = verify.main(values)
    return status, capsys.readouterr().out


def test_all_of_a_run_holds_and_nothing_in_it_changes(workdir, capsys):
    def content():
        files = [p for p in workdir.rglob("*") if p.is_file() and p.name != ".lock"]
        return {p.relative_to(workdir): p.read_bytes() for p in files}

    # What training would tidy away.
    half = workdir / "checkpoints" / "14.orbax-checkpoint-tmp"
    half.mkdir()
    before = content()
    status, out = run(capsys, workdir=str(workdir))
    assert status == 0 and "FAILED" not in out, out
    assert half.exists()
    for claim in (
        "config:",
        "data:",
        "checkpoint 8:",
        "checkpoint 10:",
        "checkpoint 12:",
        "result:",
        "model file:",
        "model's weights:",
        "replay of steps 11 to 12: the same state, bit for bit",
    ):
        assert f"ok      {claim}" in out, claim
    assert "9 of 9 claims hold" in out
    assert content() == before


def test_from_one_checkpoint_the_replay_goes_back_to_the_start(workdir, capsys):
    for step in (8, 10):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    status, out = run(capsys, workdir=str(workdir))
    assert status == 0 and "ok      replay of steps 1 to 12" in out
    status, out = run(capsys, workdir=str(workdir), replay=5)
    assert status == 0 and "-       replay of steps 1 to 12: more than" in out


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def break_checkpoint(workdir):
    # Beside it lie Orbax's own notes, which nothing reads.
    files = (workdir / "checkpoints" / "12" / "state" / "ocdbt.process_0/d").iterdir()
    flip(max(files, key=lambda p: p.stat().st_size))


def other_weights(workdir):
    """A sound model file, of other weights."""
    path = workdir / "model.safetensors"
    bundle = bundle_lib.load(path)
    bundle.variables["params"]["head"]["logits"]["bias"][0] += 1
    bundle_lib.save(path, bundle)


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        (break_checkpoint, "checkpoint 12"),
        (
            lambda w: edit(
                w / "config.json", lambda c: c["optimizer"].update(lr=0.011)
            ),
            "config",
        ),
        (
            lambda w: edit(w / "data.json", lambda c: c["train"].update(examples=95)),
            "data",
        ),
        (
            lambda w: edit(
                w / "result.json", lambda c: c.update({"params/sha256": "0" * 64})
            ),
            "result",
        ),
        (lambda w: flip(w / "model.safetensors"), "model file"),
        (lambda w: shutil.rmtree(w / "checkpoints"), "checkpoints"),
        (
            lambda w: (w / "checkpoints/12/metrics/metrics").write_text("{"),
            "checkpoints",
        ),
        (lambda w: shutil.rmtree(w / "checkpoints" / "12"), "result"),
        (other_weights, "model's weights"),
    ],
)
def test_what_was_changed_is_found(workdir, capsys, change, failed):
    change(workdir)
    status, out = run(capsys, workdir=str(workdir))
    assert status == 1
    assert f"FAILED  {failed}:" in out


def test_a_run_from_before_a_key_holds(workdir, capsys):
    """Its config has fewer keys, and so has the hash of its config."""
    path = workdir / "config.json"
    edit(path, lambda c: (c["optimizer"].pop("clip_norm"), c.pop("reproducible")))
    _, out = run(capsys, workdir=str(workdir), replay=0)
    assert "FAILED  config:" in out, "a key was taken away"
    digest = config_lib.sha256(
        Workdir(workdir).config(), without={"optimizer.clip_norm", "reproducible"}
    )
    edit(workdir / "result.json", lambda r: r.update({"config/sha256": digest}))
    status, out = run(capsys, workdir=str(workdir))
    assert status == 0 and "ok      config:" in out, out
    assert "ok      replay of steps 11 to 12" in out


def test_training_with_another_rate_leads_elsewhere(workdir, capsys):
    edit(workdir / "config.json", lambda c: c["optimizer"].update(lr=0.011))
    _, out = run(capsys, workdir=str(workdir))
    assert "FAILED  replay of steps 11 to 12: another state" in out


def test_a_model_file_alone(workdir, capsys):
    path = workdir / "model.safetensors"
    assert run(capsys, model=str(path))[0] == 0
    flip(path)
    status, out = run(capsys, model=str(path))
    assert status == 1 and "FAILED  model file:" in out


def test_usage(tmp_path):
    values = SimpleNamespace(workdir=None, model=None, replay=0)
    with pytest.raises(UsageError, match="--workdir and --model"):
        verify.main(values)
    values = SimpleNamespace(workdir=str(tmp_path / "none"), model=None, replay=0)
    with pytest.raises(UsageError, match="no run has begun there"):
        verify.main(values)
