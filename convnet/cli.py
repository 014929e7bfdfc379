"""What every entry point shares: flags, one-line errors, exit statuses.

Exit status: 0 done; 1 the job failed; 2 usage; 3 done, but some inputs could not be
read; 130 or 143 interrupted.
"""

import logging
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

from convnet import config as config_lib
from convnet import resolve
from convnet.errors import ConvnetError, UsageError

PROJECT = Path(__file__).resolve().parent.parent


class Interrupted(BaseException):
    """A signal ended the run; a BaseException, so that no `except Exception` hides it.

    Attributes:
      signum: SIGINT or SIGTERM.
      agreed: whether all processes of the run stop here.
    """

    def __init__(self, signum: int, message: str = "", agreed: bool = False) -> None:
        super().__init__(message or f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum
        self.agreed = agreed


def run(
    main: Callable[..., int | None],
    define: Callable[[flags.FlagValues, list[str]], None],
    usage: str,
    takes_arguments: bool = False,
) -> NoReturn:
    """Parses `sys.argv`, runs `main(flags)` and exits with the status that it earned.

    Args:
      main: the app; it returns the exit status, None for 0. One that takes arguments
        besides flags (paths) is called as `main(flags, arguments)`.
      define: defines the app's flags; it is given the FlagValues and the arguments
        (which `define_config` needs).
      usage: the text above the flags in `--help`.
      takes_arguments: whether there may be any.
    """
    signal.signal(signal.SIGTERM, _terminate)
    # What goes wrong in Orbax's threads reaches us as an exception of its own; without
    # these, and `_Resent`, it would also be printed, with tracebacks.
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited")
    try:
        with _Resent():
            rest: list[str] | None = [] if takes_arguments else None
            values = parse(sys.argv, define, usage, rest)
            status = (main(values) if rest is None else main(values, rest)) or 0
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt, Interrupted) as error:
        status = explain(error)
        if status is None:
            raise
    sys.exit(status)


def explain(error: BaseException) -> int | None:
    """Prints what ended a run, and returns the exit status; None for a bug of ours."""
    if isinstance(error, ConvnetError):
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    if isinstance(error, KeyboardInterrupt):
        print("interrupted by SIGINT", file=sys.stderr)
        return 130
    if isinstance(error, Interrupted):
        print(error, file=sys.stderr)
        return 128 + error.signum
    if isinstance(error, OSError) and not os.environ.get("CONVNET_TRACEBACK"):
        print(f"error: {error} (CONVNET_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1
    return None


def _terminate(signum: int, frame: object) -> NoReturn:
    raise Interrupted(signum)


class _Resent:
    """Has signals come again that got lost while the app ran.

    Python drops what is raised in destructors and in callbacks, and JAX has a callback
    in each collection of garbage. The hook stays after the app: see `_see`.
    """

    def __init__(self) -> None:
        self._again: threading.Timer | None = None
        self._over = False

    def __enter__(self) -> None:
        sys.unraisablehook = self._see

    def __exit__(self, *error: object) -> None:
        self._over = True
        self._cancel()

    def _cancel(self) -> None:
        if self._again:
            self._again.cancel()

    def _see(self, about: Any) -> None:
        error = about.exc_value
        if isinstance(error, KeyboardInterrupt | Interrupted) and not self._over:
            signum = getattr(error, "signum", signal.SIGINT)
            # After a moment the callback is over; in the next one the signal would be
            # dropped again, and come again.
            self._cancel()
            self._again = threading.Timer(0.01, os.kill, (os.getpid(), signum))
            self._again.daemon = True
            self._again.start()
        # TensorStore, after a failed write, also while the program ends.
        elif "Event loop is closed" not in str(error):
            sys.__unraisablehook__(about)


def define_config(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines --config and the overrides --config.KEY=VALUE that are in `argv`."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "the experiment: a Python file with get_config()",
        flag_values=values,
        sys_argv=argv,
    )


def parse(
    argv: list[str],
    define: Callable[[flags.FlagValues, list[str]], None],
    usage: str,
    arguments: list[str] | None = None,
) -> flags.FlagValues:
    """Returns the parsed flags; adds the arguments between them to `arguments`.

    Raises:
      UsageError: an unknown flag or key, a value of the wrong type, an argument where
        `arguments` is None, or an experiment that cannot be loaded.
      SystemExit: with status 0, after `--help`.
    """
    values = flags.FlagValues()
    if any(a in ("-h", "--h", "-help", "--help", "--helpfull") for a in argv[1:]):
        define(values, argv[:1])
        print(_help(values, usage))
        raise SystemExit(0)
    argv, experiment = _config_first(argv)
    define(values, argv)
    # Flags may follow arguments.
    values.set_gnu_getopt(arguments is not None)
    try:
        rest = values(argv)[1:]
        if experiment:
            # config_flags keeps an experiment's OSError back until something is read.
            getattr(values.config, "seed", None)
            resolve.check_type(values.config, str(experiment))
    except flags.UnrecognizedFlagError as error:
        near = resolve.nearest(error.flagname, list(values))
        raise UsageError(
            f"unknown flag --{error.flagname} (command line){near}"
            " (--help lists all flags)"
        ) from error
    except UsageError:
        raise
    except Exception as error:  # An experiment is code: it can raise anything.
        raise UsageError(_one_line(error, experiment)) from error
    if arguments is not None:
        arguments += rest
    elif rest:
        raise UsageError(f"unexpected argument {rest[0]!r} (--help shows the usage)")
    return values


def _help(values: flags.FlagValues, usage: str) -> str:
    lines = [usage.strip(), "", "flags:"]
    for name in sorted(values):
        flag = values[name]
        default = "" if flag.default is None else f" (default: {flag.default!r})"
        lines.append(f"  --{name}\n      {flag.help}{default}")
    if "config" in values:
        lines += ["", "config keys and their defaults:", config_lib.describe()]
    return "\n".join(lines)


def _config_first(argv: list[str]) -> tuple[list[str], Path | None]:
    """Checks the names of the overrides and puts --config, made absolute, first.

    Returns the arguments and the experiment, None without --config.

    `config_flags` wants --config before its overrides; a person need not know.
    """
    path, rest, overrides = None, [], []
    arguments = iter(argv[1:])
    for argument in arguments:
        if argument == "--":
            rest += [argument, *arguments]
        elif match := re.fullmatch(r"--?config(?:=(.*))?", argument, re.DOTALL):
            path = match[1] if match[1] is not None else next(arguments, "")
        else:
            if match := re.match(r"--?(?:no)?config\.([^=]*)", argument):
                resolve.check_key(match[1], f"command line: {argument}")
                overrides.append(argument)
            rest.append(argument)
    if path is None and overrides:
        raise UsageError(
            f"{overrides[0]} changes an experiment, but --config is missing"
        )
    if path is None:
        return argv, None
    experiment = _find_experiment(path)
    return [argv[0], f"--config={experiment}", *rest], experiment


def _find_experiment(path: str) -> Path:
    """Looks for an experiment from the current folder, then from the project's."""
    for folder in (Path.cwd(), PROJECT):
        if (folder / path).is_file():
            return (folder / path).resolve()
    names = sorted(p.stem for p in (PROJECT / "experiments").glob("*.py"))
    near = resolve.nearest(Path(path).stem, names)
    raise UsageError(
        f"--config={path}: no such file, neither in {Path.cwd()} nor in {PROJECT}{near}"
        f" (experiments: {', '.join(names)})"
    )


def _one_line(error: Exception, experiment: Path | None) -> str:
    """Says what is wrong with a flag, or in which line of an experiment."""
    cause: BaseException | None = error
    # absl and config_flags wrap what an experiment raises in errors of their own.
    while cause is not None:
        for frame in reversed(traceback.extract_tb(cause.__traceback__)):
            # An experiment may build on another one beside it.
            if experiment and Path(frame.filename).parent == experiment.parent:
                return _in_experiment(cause, frame)
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(error).split())
    if isinstance(error, flags.Error) or experiment is None:
        return text
    return f"{experiment}: {type(error).__name__}: {text}"


def _in_experiment(error: BaseException, frame: traceback.FrameSummary) -> str:
    text = " ".join(str(error).split())
    where = f"{frame.filename}:{frame.lineno}: {frame.line}"
    if unknown := re.search(r"Key \"(\w+)\" does not exist", text):
        key = _key_of(frame.line or "", unknown[1])
        near = resolve.nearest(key, tuple(config_lib.KEYS))
        return f"unknown config key {key!r} ({where}){near}"
    return f"{where}: {type(error).__name__}: {text}"


def _key_of(line: str, leaf: str) -> str:
    """Returns the dotted key that a line such as `config.data.nam = 1` sets."""
    found = re.search(rf"\w+((?:\.\w+)*\.{leaf})\b", line)
    return found[1].lstrip(".") if found else leaf
