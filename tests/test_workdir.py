"""The folder of a run: its rules, and that nothing in it is ever half there."""

import errno
import json
import os
import resource
import struct

import pytest
from tensorboardX.proto import event_pb2

from convnet import config as config_lib
from convnet import files, resolve
from convnet.errors import ConvnetError, UsageError
from convnet.workdir import Workdir


@pytest.fixture
def workdir(tmp_path):
    workdir = Workdir(tmp_path / "run")
    workdir.create()
    yield workdir
    workdir.close()


def config_with(**changes):
    """As a run has it, with all that is filled in."""
    config = config_lib.default()
    config.data.mean, config.data.std = (0.5,), (0.25,)
    for name, value in changes.items():
        section, key = name.split("__")
        config[section][key] = value
    resolve.resolve(config, measure=None)
    return config


def saved(workdir, **changes):
    workdir.write_json("config.json", config_lib.to_dict(config_with(**changes)))
    return workdir


def events(workdir):
    """Every event of the TensorBoard files, in the order in which they were opened."""
    found = []
    for path in sorted((workdir.path / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            assert struct.unpack("<I", data[8:12])[0] == masked_crc32c(data[:8])
            body, data = data[12 : 12 + length], data[12 + length :]
            assert struct.unpack("<I", data[:4])[0] == masked_crc32c(body)
            found.append(event_pb2.Event.FromString(body))
            data = data[4:]
    return found


def masked_crc32c(data):
    """RFC 3720's CRC-32C bit by bit, masked as a TFRecord wants it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# Files.


def test_json_comes_back(workdir):
    assert workdir.read_json("result.json") is None
    content = {"step": 3, "test/loss": 0.25, "versions": {"jax": "1"}, "list": [1, 2]}
    workdir.write_json("result.json", content)
    assert workdir.read_json("result.json") == content
    assert json.loads((workdir.path / "result.json").read_text()) == content


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "result.json"
    files.write(path, "old")

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(ConvnetError, match="result.json cannot be written: No space"):
        files.write(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    files.write(path, "new")
    assert path.read_text() == "new"


def test_a_reader_never_sees_a_part(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    files.write(path, "old")
    real, seen = os.fsync, []

    def fsync(file):
        real(file)
        seen.append(path.read_text())

    monkeypatch.setattr(os, "fsync", fsync)
    files.write(path, "new")
    assert seen == ["old"] and path.read_text() == "new"


@pytest.mark.parametrize(
    "content",
    [b'{"step": 1', b"", b"\0\0", b"\x80", b"[]", b'{"optimizer": {"lr": []}}'],
)
def test_a_broken_json_file_is_named(workdir, content):
    (workdir.path / "config.json").write_bytes(content)
    with pytest.raises(ConvnetError) as error:
        workdir.check(config_with())
    assert str(workdir.path / "config.json") in str(error.value)
    assert "nothing else is lost: remove this file" in str(error.value)


@pytest.mark.parametrize("below", ["", "runs/a"])
def test_a_place_that_cannot_be_written_to(tmp_path, below):
    (tmp_path / "file").write_text("I am a file")
    path = tmp_path / "file" / below if below else tmp_path / "file"
    workdir = Workdir(path)
    # Resuming is looked into first.
    assert workdir.read_json("result.json") is None
    with pytest.raises(ConvnetError) as error:
        workdir.create()
    assert f"--workdir={path} cannot be written to" in str(error.value)
    assert "choose another" in str(error.value)
    assert (tmp_path / "file").read_text() == "I am a file"


def test_a_read_only_place(tmp_path, monkeypatch):
    def refuse(self, data):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "write_bytes", refuse)
    with pytest.raises(ConvnetError, match="cannot be written to: Permission denied"):
        Workdir(tmp_path / "a" / "b").create()


def test_create_makes_parents_and_leaves_nothing_behind(tmp_path):
    workdir = Workdir(tmp_path / "a" / "b")
    workdir.create()
    (workdir.path / "kept").write_text("x")
    workdir.create()
    assert [p.name for p in workdir.path.iterdir()] == ["kept"]


# Another config.


def test_the_same_config_goes_on(workdir):
    workdir.check(config_with())
    saved(workdir)
    workdir.check(config_with())
    # Neither where nor how often changes the result.
    workdir.check(
        config_with(
            data__dir="/elsewhere",
            data__workers=4,
            train__log_every=7,
            checkpoint__keep=9,
        )
    )


def test_another_config_is_refused_with_both_values(workdir):
    saved(workdir, optimizer__lr=0.5, model__widths=(8, 16))
    config = config_with(
        optimizer__lr=0.25, model__widths=(8,), data__workers=4, data__name="cifar10"
    )
    with pytest.raises(UsageError) as error:
        workdir.check(config)
    first, *lines, last = str(error.value).splitlines()
    assert str(workdir.path) in first and "--workdir" in last
    assert lines == [
        "  data.name: 'digits' there, 'cifar10' now",
        "  model.widths: [8, 16] there, [8] now",
        "  optimizer.lr: 0.5 there, 0.25 now",
    ]


def test_a_key_that_an_older_version_did_not_have_is_its_default(workdir):
    content = config_lib.to_dict(config_with(model__depth=3))
    del content["optimizer"]["clip_norm"], content["task"], content["mesh"]
    # Filled in by a run: the model's own, and "none".
    del content["model"]["kernel"], content["evaluate"]["tta"]
    workdir.write_json("config.json", content)
    assert {"optimizer.clip_norm", "task.name", "model.kernel", "evaluate.tta"} < (
        workdir.younger_keys()
    )
    assert not {"optimizer.lr", "model.depth"} & workdir.younger_keys()
    workdir.check(config_with(model__depth=3))
    with pytest.raises(UsageError) as error:
        workdir.check(
            config_with(
                model__depth=3,
                model__kernel=5,
                optimizer__clip_norm=1.0,
                task__label_smoothing=0.1,
            )
        )
    assert str(error.value).splitlines()[1:-1] == [
        "  model.kernel: 3 there, 5 now",
        "  task.label_smoothing: 0.0 there, 0.1 now",
        "  optimizer.clip_norm: 0.0 there, 1.0 now",
    ]


def test_adopt_takes_over_what_was_measured(workdir):
    config = config_lib.default()
    workdir.adopt(config)
    assert config.data.mean == () and config.data.std == ()
    saved(workdir)
    workdir.adopt(config)
    assert config.data.mean == (0.5,) and config.data.std == (0.25,)
    given = config_with(data__mean=(0.125,))
    workdir.adopt(given)
    assert given.data.mean == (0.125,)


# Metrics.


def write_metrics(workdir):
    workdir.cut(0)
    for step in (10, 20, 30):
        workdir.log(step, {"train/loss": 1.0 / step, "epoch": step / 10})
    workdir.log(20, {"test/loss": 0.5})
    workdir.close()
    return workdir.path / "metrics.jsonl"


def test_log_appends_a_row(workdir):
    path = write_metrics(workdir)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0] == {"step": 10, "train/loss": 0.1, "epoch": 1.0}
    assert [row["step"] for row in rows] == [10, 20, 30, 20]
    assert workdir.history() == rows


@pytest.mark.parametrize(
    ("step", "kept"), [(0, []), (19, [10]), (20, [10, 20, 20]), (99, [10, 20, 30, 20])]
)
def test_cut_drops_later_rows(workdir, step, kept):
    path = write_metrics(workdir)
    before = path.read_text().splitlines()
    workdir.cut(step)
    after = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in after] == kept
    assert set(after) <= set(before)
    workdir.log(step + 1, {"train/loss": 0.0})
    assert [row["step"] for row in workdir.history()] == [*kept, step + 1]


@pytest.mark.parametrize("rest", ['{"step": 40, "train/lo', '{"step": 40', "{", '{"'])
def test_cut_drops_half_a_line_without_a_word(workdir, rest, capsys):
    path = write_metrics(workdir)
    whole = path.read_text()
    path.write_text(whole + rest)
    assert len(workdir.history()) == 4
    workdir.cut(20)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 20]
    assert capsys.readouterr().out == ""
    workdir.log(21, {"train/loss": 0.0})
    assert workdir.history()[-1] == {"step": 21, "train/loss": 0.0}


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (lambda lines: lines[:2], [10, 20]),
        (lambda lines: [], []),
        (lambda lines: None, []),
        (lambda lines: [lines[0], b"\x80", *lines[1:]], [10, 20, 30, 20]),
        (lambda lines: [b"[1]", b"5", b'{"stop": 3}', *lines], [10, 20, 30, 20]),
    ],
    ids=["shortened", "emptied", "deleted", "not text", "other content"],
)
def test_damaged_metrics_are_named_and_do_not_stop_a_run(workdir, damage, kept, capsys):
    path = write_metrics(workdir)
    lines = damage(path.read_bytes().splitlines())
    if lines is None:
        path.unlink()
    else:
        path.write_bytes(b"".join(line + b"\n" for line in lines))
    workdir.cut(30)
    printed = capsys.readouterr().out
    assert f"warning: {path} is damaged: it lacks rows of steps 1 to 30" in printed
    assert [row["step"] for row in workdir.history()] == kept


def test_a_full_disk_names_the_file_and_half_a_row_is_cut_off(workdir):
    path = write_metrics(workdir)
    whole = path.read_bytes()
    workdir.cut(30)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 9, before[1]))
    try:
        with pytest.raises(ConvnetError, match=f"{path} cannot be written: .* room"):
            workdir.log(40, {"train/loss": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    workdir.close()
    assert path.read_bytes().startswith(whole)
    workdir.cut(30)
    assert path.read_bytes() == whole


def test_history_of_a_run_without_metrics(workdir):
    assert workdir.history() == []
    workdir.cut(5)
    assert not (workdir.path / "metrics.jsonl").exists()


def test_tensorboard_holds_the_points_and_hides_those_after_the_cut(workdir):
    write_metrics(workdir)
    workdir.cut(20)
    workdir.log(21, {"train/loss": 0.25})
    points, purges = [], []
    for event in events(workdir):
        if event.HasField("session_log"):
            assert event.session_log.status == event_pb2.SessionLog.START
            purges.append(event.step)
        points += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    assert purges == [1, 21]
    assert points == [
        *[
            point
            for step in (10, 20, 30)
            for point in (
                (step, "train/loss", pytest.approx(1.0 / step)),
                (step, "epoch", step / 10),
            )
        ],
        (20, "test/loss", 0.5),
        (21, "train/loss", 0.25),
    ]


def test_only_one_process_trains_in_a_folder(tmp_path):
    first, second = Workdir(tmp_path), Workdir(tmp_path)
    first.lock()
    with pytest.raises(ConvnetError, match=f"training in {tmp_path}: wait"):
        second.lock()
    first.close()
    second.lock()
    second.close()
