"""Command lines: what is refused, how it is said, and with which exit status."""

import gc
import os
import re
import signal
import sys
import threading
import time

import pytest
from absl import flags, logging

from convnet import cli, main, resolve
from convnet import config as config_lib
from convnet.errors import ConvnetError, UsageError

HEAD = "from convnet import config as config_lib\n\n\ndef get_config():\n"


@pytest.fixture(autouse=True)
def one_experiment_a_process(monkeypatch):
    """config_flags loads every experiment as the same module, on top of the last."""
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    yield
    sys.modules.pop("config_config", None)


@pytest.fixture
def experiment(tmp_path):
    """Writes an experiment with the given lines in get_config()."""

    def write(*lines, text=None, name="mine.py"):
        path = tmp_path / name
        body = "".join(f"    {line}\n" for line in lines)
        start = f"{HEAD}    config = config_lib.default()\n"
        path.write_text(text or f"{start}{body}    return config\n")
        return path

    return write


def parse(*arguments):
    return cli.parse(["convnet.main", *map(str, arguments)], main.define, "usage")


def refused(*arguments):
    """The message of the UsageError, which is one line."""
    with pytest.raises(UsageError) as error:
        parse(*arguments)
    message = str(error.value)
    assert "\n" not in message and "Traceback" not in message
    return message


# Accepted.


def test_overrides_win_over_the_experiment(experiment):
    path = experiment("config.optimizer.lr = 0.5", "config.optimizer.momentum = 0.8")
    config = parse(f"--config={path}", "--config.optimizer.lr=0.25").config
    assert config_lib.changed(config) == {
        "optimizer.lr": 0.25,
        "optimizer.momentum": 0.8,
    }


@pytest.mark.parametrize("order", ["before", "after", "apart", "single dash"])
def test_overrides_may_stand_anywhere(experiment, order):
    path = experiment()
    arguments = {
        "before": ["--config.seed=3", "--workdir=w", f"--config={path}"],
        "after": [f"--config={path}", "--workdir=w", "--config.seed=3"],
        "apart": ["--config.seed", "3", "--workdir", "w", "--config", path],
        "single dash": ["-config.seed=3", "-workdir=w", f"-config={path}"],
    }[order]
    values = parse(*arguments)
    assert config_lib.changed(values.config) == {"seed": 3}
    assert values.workdir == "w" and values.preview is False


@pytest.mark.parametrize(
    ("argument", "name", "want"),
    [
        ("model.widths=(8,16)", "model.widths", (8, 16)),
        ("model.widths=8,16", "model.widths", (8, 16)),
        ("model.widths=(8,)", "model.widths", (8,)),
        ("model.widths=()", "model.widths", ()),
        ("data.mean=0.5,0.25,0.125", "data.mean", (0.5, 0.25, 0.125)),
        ("schedule.steps=(0.5, 0.75)", "schedule.steps", (0.5, 0.75)),
        ("optimizer.nesterov=false", "optimizer.nesterov", False),
        ("augment.trivial", "augment.trivial", True),
        ("optimizer.lr=1e-3", "optimizer.lr", 0.001),
        ("train.epochs=3", "train.epochs", 3.0),
        ("data.dir=a=b", "data.dir", "a=b"),
        ("model.depth=3", "model.depth", 3),
    ],
)
def test_values(experiment, argument, name, want):
    config = parse(f"--config={experiment()}", f"--config.{argument}").config
    assert config_lib.flatten(config)[name] == want
    assert type(config_lib.flatten(config)[name]) is type(want)
    resolve.validate(config)


def test_nokey_switches_off(experiment):
    config = parse(f"--config={experiment()}", "--noconfig.optimizer.nesterov").config
    assert config.optimizer.nesterov is False


def test_a_shipped_experiment_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = parse("--config=experiments/digits.py")
    assert values.config.data.name == "digits" and values.config.model.norm == "batch"
    found = values["config"].config_filename
    assert found == str(cli.PROJECT / "experiments" / "digits.py")


def test_an_experiment_here_comes_before_a_shipped_one(
    experiment, tmp_path, monkeypatch
):
    (tmp_path / "experiments").mkdir()
    experiment("config.seed = 77", name="experiments/digits.py")
    monkeypatch.chdir(tmp_path)
    assert parse("--config=experiments/digits.py").config.seed == 77


def test_no_config_is_left_to_the_app():
    assert parse().config is None
    with pytest.raises(UsageError, match="--config is missing"):
        main.main(parse())


# Refused.


def test_unknown_key_on_the_command_line(experiment):
    path = experiment()
    for argument in ("--config.data.batchsize=3", "-config.data.batchsize=3"):
        for order in ([f"--config={path}", argument], [argument, f"--config={path}"]):
            message = refused(*order)
            assert "unknown config key 'data.batchsize'" in message
            assert f"(command line: {argument})" in message
            assert "did you mean 'data.batch_size'?" in message
    assert "'optimizer.nesterof'" in refused(
        f"--config={path}", "--noconfig.optimizer.nesterof"
    )
    assert "'data'" in refused(f"--config={path}", "--config.data=3")


def test_unknown_key_in_an_experiment(experiment):
    path = experiment("config.seed = 1", "config.data.batchsize = 3")
    message = refused(f"--config={path}")
    assert message.startswith("unknown config key 'data.batchsize'")
    assert f"{path}:7: config.data.batchsize = 3" in message
    assert "did you mean 'data.batch_size'?" in message
    # The line that is at fault, with an override at hand too.
    assert message == refused(f"--config={path}", "--config.seed=4")


def test_unknown_section_in_an_experiment(experiment):
    path = experiment("config.optimiser.lr = 3.0")
    message = refused(f"--config={path}")
    assert f"{path}:6:" in message and "optimiser" in message
    assert '"optimizer"' in message


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("--config.optimizer.lr=fast", "fast"),
        ("--config.data.batch_size=1.5", "1.5"),
        ("--config.model.depth=two", "two"),
        ("--config.optimizer.nesterov=perhaps", "perhaps"),
        ("--preview=perhaps", "perhaps"),
    ],
)
def test_wrong_type_on_the_command_line(experiment, argument, value):
    message = refused(f"--config={experiment()}", argument)
    assert argument.partition("=")[0] in message and value in message


def test_wrong_type_in_an_experiment(experiment):
    path = experiment("config.optimizer.lr = 'fast'")
    message = refused(f"--config={path}")
    assert f"{path}:6: config.optimizer.lr = 'fast'" in message
    assert "'lr'" in message and "float" in message


def test_wrong_type_in_a_function_of_an_experiment(experiment):
    text = "def change(config):\n    config.seed = 'x'\n\n\n" + HEAD
    text += "    config = config_lib.default()\n    change(config)\n    return config\n"
    path = experiment(text=text)
    assert f"{path}:2: config.seed = 'x'" in refused(f"--config={path}")


def test_an_error_in_an_experiment_that_is_part_of_the_project(
    experiment, tmp_path, monkeypatch
):
    monkeypatch.setattr(cli, "PROJECT", tmp_path.parent)
    path = experiment("config.data.batchsize = 3")
    assert f"{path}:6: " in refused(f"--config={path}")


def test_syntax_error(experiment):
    path = experiment(text="x = 1\ndef get_config(:\n")
    message = refused(f"--config={path}")
    assert str(path) in message and "line 2" in message and "SyntaxError" in message


def test_an_experiment_that_does_not_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused("--config=experiments/digit.py")
    assert "--config=experiments/digit.py: no such file" in message
    assert str(tmp_path) in message and str(cli.PROJECT) in message
    assert "did you mean 'digits'?" in message and "cifar10" in message
    for empty in (["--config="], ["--config"], [f"--config={tmp_path}"]):
        assert "no such file" in refused(*empty)


def test_an_experiment_without_get_config(experiment):
    path = experiment(text="x = 1\n")
    message = refused(f"--config={path}")
    assert str(path) in message and "get_config" in message


def test_get_config_that_returns_something_else(experiment):
    path = experiment(text=HEAD + "    config = config_lib.default()\n")
    message = refused(f"--config={path}")
    assert f"get_config() of {path} returned NoneType" in message
    assert str(path) in refused(f"--config={path}", "--config.seed=3")
    path = experiment("config.unlock()", "config.data.batchsize = 3")
    message = refused(f"--config={path}")
    assert "'data.batchsize'" in message and str(path) in message
    assert "did you mean 'data.batch_size'?" in message


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("open('/no/such/file')", "FileNotFoundError"),
        ("import no_such_module", "ModuleNotFoundError"),
        ("1 / 0", "ZeroDivisionError"),
        ("raise ValueError('two\\n\\nlines')", "ValueError: two lines"),
    ],
)
def test_an_experiment_that_raises(experiment, line, said):
    path = experiment(line)
    message = refused(f"--config={path}")
    assert f"{path}:6: {line}" in message and said in message


def test_overrides_without_an_experiment():
    assert "--config.seed=3" in refused("--config.seed=3")
    assert "--config is missing" in refused("--config.seed=3")


def test_unknown_flag(experiment):
    message = refused(f"--config={experiment()}", "--wrkdir=x")
    assert "unknown flag --wrkdir (command line)" in message
    assert "did you mean 'workdir'?" in message


@pytest.mark.parametrize("rest", [["extra"], ["--", "extra"], ["--", "--config=x"]])
def test_positional_argument(experiment, rest):
    message = refused(f"--config={experiment()}", *rest)
    assert f"unexpected argument {rest[-1]!r}" in message


def test_a_wrong_flag_of_an_app_without_experiments(monkeypatch):
    def define(values, argv):
        flags.DEFINE_integer("number", 1, "a number", flag_values=values)
        flags.DEFINE_string("name", None, "a name", flag_values=values)
        flags.mark_flag_as_required("name", values)

    for arguments, said in ((["--number=x", "--name=y"], "number"), ([], "name")):
        with pytest.raises(UsageError, match=f"--{said}"):
            cli.parse(["app", *arguments], define, "usage")


# Help.


@pytest.mark.parametrize("argument", ["--help", "-h", "--helpfull"])
def test_help_prints_the_flags_and_every_key(capsys, argument):
    # With a wrong key beside it: who asks for help may not know the keys.
    with pytest.raises(SystemExit) as exit_:
        parse(argument, "--config.data.batchsize=1")
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage\n")
    for flag in ("config", "workdir", "preview"):
        assert f"  --{flag}\n" in printed
    assert re.findall(r"--config\.([\w.]+)=", printed) == list(config_lib.KEYS)


# Exit statuses.


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an app; returns its exit status and what it wrote to stderr."""
    monkeypatch.delenv("CONVNET_TRACEBACK", raising=False)
    # What `run` sets for the whole process.
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    before = signal.getsignal(signal.SIGTERM), logging.get_verbosity()

    def start(app, *arguments):
        monkeypatch.setattr(sys, "argv", ["app", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.run(app, lambda values, argv: None, "usage")
        return exit_.value.code, capsys.readouterr().err

    yield start
    signal.signal(signal.SIGTERM, before[0])
    logging.set_verbosity(before[1])


def raising(error):
    def app(values):
        raise error

    return app


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UsageError("--x: no such file"), 2, "error: --x: no such file\n"),
        (ConvnetError("line one\nline two"), 1, "error: line one\nline two\n"),
        (KeyboardInterrupt(), 130, "interrupted by SIGINT\n"),
        (cli.Interrupted(signal.SIGINT), 130, "interrupted by SIGINT\n"),
        (cli.Interrupted(signal.SIGTERM), 143, "interrupted by SIGTERM\n"),
        (cli.Interrupted(signal.SIGTERM, "saved at 3"), 143, "saved at 3\n"),
    ],
)
def test_exit_status_and_message(run, error, status, message):
    assert run(raising(error)) == (status, message)


def test_an_os_error_is_one_line_that_says_how_to_see_more(run, monkeypatch):
    error = OSError(28, "No space left on device", "/data/x")
    status, message = run(raising(error))
    assert status == 1 and message.startswith("error: [Errno 28] No space left")
    assert "'/data/x'" in message and "CONVNET_TRACEBACK=1" in message
    assert message.count("\n") == 1
    monkeypatch.setenv("CONVNET_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["app"])
    with pytest.raises(OSError):
        cli.run(raising(error), lambda values, argv: None, "usage")


def test_a_mistake_of_ours_keeps_its_traceback(run, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["app"])
    with pytest.raises(ZeroDivisionError):
        cli.run(raising(ZeroDivisionError()), lambda values, argv: None, "usage")


def test_sigterm_ends_an_app_that_catches_every_exception(run):
    reached = []

    def app(values):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 1)
        except Exception:
            reached.append("hidden")
        reached.append("went on")

    assert run(app) == (143, "interrupted by SIGTERM\n")
    assert reached == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_collection_of_garbage_ends_the_app(run, signum):
    reached = []

    def collected(phase, about):
        gc.callbacks.remove(collected)
        reached.append("dropped")
        os.kill(os.getpid(), signum)

    def app(values):
        gc.callbacks.append(collected)
        gc.collect()
        time.sleep(20)
        reached.append("went on")

    assert run(app) == (128 + signum, f"interrupted by {signum.name}\n")
    assert reached == ["dropped"]


def test_no_signal_comes_again_after_the_app(run, monkeypatch):
    timers = []

    class Timer:
        """Stands for one that has not run out when the app ends."""

        def __init__(self, *arguments):
            timers.append(self)

        def start(self):
            self.state = "started"

        def cancel(self):
            self.state = "cancelled"

    class Dropped:
        def __del__(self):
            raise cli.Interrupted(signal.SIGTERM)

    kept = []

    def app(values):
        kept.append(Dropped())
        Dropped()
        raise ConvnetError("failed")

    monkeypatch.setattr(threading, "Timer", Timer)
    monkeypatch.setattr(sys, "__unraisablehook__", lambda about: kept.append("printed"))
    assert run(app) == (1, "error: failed\n")
    assert [timer.state for timer in timers] == ["cancelled"]
    # What is dropped later stays so.
    del kept[0]
    assert len(timers) == 1 and kept == ["printed"]


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (3, 3), (1, 1)])
def test_the_app_sets_the_status(run, returned, status):
    assert run(lambda values: returned) == (status, "")


def test_the_app_is_given_the_flags(run, monkeypatch):
    seen = []

    def define(values, argv):
        flags.DEFINE_integer("number", 1, "a number", flag_values=values)

    monkeypatch.setattr(sys, "argv", ["app", "--number=7"])
    with pytest.raises(SystemExit):
        cli.run(lambda values: seen.append(values.number), define, "usage")
    assert seen == [7]


def test_usage_errors_of_the_parser_exit_with_2(run):
    status, message = run(lambda values: None, "--nothing=1")
    assert status == 2 and message.startswith("error: unknown flag --nothing")
    status, message = run(lambda values: None, "one")
    assert status == 2 and message == (
        "error: unexpected argument 'one' (--help shows the usage)\n"
    )
