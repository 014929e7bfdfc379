"""The launchers, with programs in place of Python that say what they are told."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [
    *(f"launch/{name}.sh" for name in ("setup", "local", "test", "docs")),
    ".ci/run",
]
# All that the launchers may need besides bash.
TOOLS = "bash cat cksum dirname env find ls mkdir mktemp mv rm sleep sort tail tee"

# It notes each call, answers like an interpreter of its version, and "makes" an
# environment by copying itself. While $TMP/hold-pip exists, its pip takes its time.
FAKE = """#!{bash}
case "$*" in
*"import fcntl"*) exec {real} "$@" ;;
esac
echo "{name} ${{*//$'\\n'/ }}" >>"{calls}"
case "$*" in
*"import ensurepip"*)
    case " {broken} " in *" run "*) echo "{name}: broken" >&2; exit 127 ;; esac
    case " ${{*:4}} " in
    *" {minor} "*) echo "{minor}.5 $0" ;;
    *) echo "is Python {minor}.5" >&2; exit 1 ;;
    esac ;;
*"-m venv"*)
    mkdir -p "${{@: -1}}/bin"
    cp "$0" "${{@: -1}}/bin/python" ;;
*"-m pip"*)
    while [ -e "{tmp}/hold-pip" ]; do sleep 0.02; done
    if [ -e "{tmp}/fail-pip" ]; then echo "no route to the index"; exit 1; fi ;;
*"-m convnet.main"* | *"-m pytest"*)
    printf '%s\\n' "$PWD" "$@"
    exit 3 ;;
esac
"""


class Box:
    """A project, a home and a path of its own; `python(...)` adds an interpreter."""

    def __init__(self, tmp: Path) -> None:
        self.tmp = tmp
        self.project = tmp / "my project"
        self.bin = tmp / "bin"
        self.calls = tmp / "calls"
        self.pyenv = tmp / "home/.pyenv/versions"
        for folder in (self.project / "launch", self.project / ".ci", self.bin):
            folder.mkdir(parents=True)
        for name in [*SCRIPTS, "pyproject.toml", "launch/pins.txt"]:
            shutil.copy(ROOT / name, self.project / name)
        for tool in [*TOOLS.split(), "cp"]:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.env = {"PATH": str(self.bin), "HOME": str(tmp / "home")}

    def python(self, path: str, minor: str, broken: str = "") -> Path:
        """Adds an interpreter that says it is `minor`; `broken="run"`: it fails."""
        file = self.tmp / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            FAKE.format(
                bash=shutil.which("bash"),
                real=sys.executable,
                name=path,
                minor=minor,
                broken=broken,
                calls=self.calls,
                tmp=self.tmp,
            )
        )
        file.chmod(0o755)
        return file

    def start(self, script: str, *args: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.project / script, *args],
            env=self.env | env,
            cwd=self.tmp,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A runner in the background ignores Ctrl-C, and its children with it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, script: str, *args: str, **env: str) -> tuple[int, str, str]:
        process = self.start(script, *args, **env)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def find(self, *versions: str, **env: str) -> str:
        status, out, err = self.run("launch/setup.sh", "--find", *versions, **env)
        assert status == 0, err
        return out.strip().removeprefix(f"{self.tmp}/")

    def count(self, what: str) -> int:
        """How many calls of an interpreter had `what` in them."""
        calls = self.calls.read_text().splitlines() if self.calls.exists() else []
        return sum(what in call for call in calls)

    def wait_for(self, what: str) -> None:
        deadline = time.monotonic() + 60
        while not self.count(what):
            assert time.monotonic() < deadline, f"no call with {what}"
            time.sleep(0.01)


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    yield Box(tmp_path)
    (tmp_path / "hold-pip").unlink(missing_ok=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse_and_can_be_executed(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True)
    assert os.access(ROOT / script, os.X_OK)


def test_newest_python_that_runs_wins(box: Box) -> None:
    box.python("bin/python3", "3.12")
    assert box.find() == "bin/python3"
    box.python("bin/python3.11", "3.11")
    assert box.find() == "bin/python3.11", "a versioned name goes before python3"
    box.python("home/.pyenv/versions/3.12.9/bin/python", "3.12")
    box.python("home/.pyenv/versions/3.12.10/bin/python", "3.12")
    assert box.find() == "home/.pyenv/versions/3.12.10/bin/python"
    box.python("bin/python3.12", "3.12")
    assert box.find() == "bin/python3.12", "the path goes before pyenv"
    # A shim of pyenv exists for each version that is installed, but may not run.
    box.python("bin/python3.13", "3.13", broken="run")
    assert box.find() == "bin/python3.12"
    box.python("other/python3.13", "3.13")
    path = f"{box.bin}:{box.tmp}/other"
    assert box.find(PATH=path) == "other/python3.13", "any place on the path will do"
    assert box.find("3.11", PATH=path) == "bin/python3.11"


def test_python_outside_the_range_is_not_taken(box: Box) -> None:
    box.python("bin/python3", "3.14")
    box.python("bin/python3.12", "3.12", broken="run")
    status, out, err = box.run("launch/local.sh", "--help")
    assert (status, out) == (1, "")
    assert "CONVNET_PYTHON=" in err
    assert f"{box.bin}/python3: is Python 3.14.5" in err
    assert f"{box.bin}/python3.12: bin/python3.12: broken" in err
    assert not (box.project / ".venv").exists()


def test_convnet_python_decides(box: Box) -> None:
    box.python("bin/python3.13", "3.13")
    old = box.python("bin/python3.11", "3.11")
    assert box.find(CONVNET_PYTHON="python3.11") == "bin/python3.11"
    assert box.find(CONVNET_PYTHON=str(old)) == "bin/python3.11"
    box.python("bin/python3.10", "3.10")
    for value, reason in [
        ("python3.10", "is Python 3.10.5"),
        ("/nowhere/python", "no such program"),
    ]:
        status, out, err = box.run("launch/local.sh", CONVNET_PYTHON=value)
        assert (status, out) == (2, "")
        assert f"CONVNET_PYTHON={value}" in err and reason in err


def test_real_python_is_recognised(box: Box) -> None:
    expected = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    assert box.find(CONVNET_PYTHON=sys.executable) == expected
    version = "3.11" if sys.version_info[:2] != (3, 11) else "3.12"
    status, _, err = box.run(
        "launch/setup.sh", "--find", version, CONVNET_PYTHON=sys.executable
    )
    assert status == 2
    assert f"is Python {sys.version.split()[0]}, not {version}" in err


def test_arguments_folder_and_status_pass_through(box: Box) -> None:
    box.python("bin/python3.13", "3.13")
    status, out, err = box.run("launch/local.sh", "--config=a b.py", "", "*", "$HOME")
    assert status == 3
    assert out.splitlines() == [
        str(box.tmp), "-P", "-m", "convnet.main",
        "--config=a b.py", "", "*", "$HOME",
    ]  # fmt: skip
    assert f"{box.project}/.venv" in err and "3.13.5" in err


def test_nothing_is_done_twice(box: Box) -> None:
    box.python("bin/python3.13", "3.13")
    box.run("launch/local.sh")
    before = box.calls.read_text()
    status, _, err = box.run("launch/local.sh", "again")
    assert (status, err) == (3, "")
    # Nothing but the program itself: no search, no lock, no pip.
    assert box.calls.read_text() == before + "bin/python3.13 -P -m convnet.main again\n"


def test_tests_add_their_extra_and_local_keeps_it(box: Box) -> None:
    box.python("bin/python3.13", "3.13")
    box.run("launch/local.sh")
    status, out, _ = box.run("launch/test.sh", "-k", "two words")
    assert status == 3
    folder, *arguments = out.splitlines()
    assert folder == str(box.project)
    assert arguments[:3] == ["-m", "pytest", "-n"]
    assert arguments[-2:] == ["-k", "two words"]
    assert box.count("-m venv") == 1 and box.count("-e .[test]") == 1
    box.run("launch/local.sh")
    box.run("launch/setup.sh", "tpu")
    assert box.count("-m pip") == 3 and box.count("-e .[tpu,test]") == 1
    box.run("launch/test.sh")
    assert box.count("-m pip") == 3


@pytest.mark.parametrize("args", [["-n", "3"], ["-n0"], ["--numprocesses=2"]])
def test_number_of_workers_can_be_chosen(box: Box, args: list[str]) -> None:
    box.python("bin/python3.13", "3.13")
    _, out, _ = box.run("launch/test.sh", *args)
    assert out.splitlines()[1:] == ["-m", "pytest", *args]


def test_changed_pins_are_installed(box: Box) -> None:
    box.python("bin/python3.13", "3.13")
    box.run("launch/local.sh")
    with open(box.project / "launch/pins.txt", "a") as pins:
        pins.write("another==1\n")
    box.run("launch/local.sh")
    box.run("launch/local.sh")
    assert box.count("-m venv") == 1
    assert box.count("-m pip install") == box.count("-c launch/pins.txt") == 2


def test_another_python_or_place_makes_it_again(box: Box) -> None:
    box.python("bin/python3.13", "3.13")
    box.python("bin/python3.12", "3.12")
    box.run("launch/local.sh", CONVNET_PYTHON="python3.12")
    assert box.count("bin/python3.12 -I -m venv") == 1
    box.run("launch/local.sh")
    assert box.count("-m venv") == 1, "it keeps its Python until told otherwise"
    box.run("launch/local.sh", CONVNET_PYTHON="python3.13")
    assert box.count("bin/python3.13 -I -m venv") == 1
    box.project = box.project.rename(box.tmp / "moved")
    box.run("launch/local.sh")
    assert box.count("-m venv") == 3
    (box.project / ".venv/bin/python").unlink()
    box.run("launch/local.sh")
    assert box.count("-m venv") == 4


def test_failed_installation_says_why_and_starts_afresh(box: Box) -> None:
    box.python("bin/python3.13", "3.13")
    (box.tmp / "fail-pip").touch()
    status, out, err = box.run("launch/test.sh")
    assert (status, out) == (1, "")
    assert "no route to the index" in err and "run the same command again" in err
    (box.tmp / "fail-pip").unlink()
    left = box.project / ".venv/bin/left-over"
    left.touch()
    assert box.run("launch/local.sh")[0] == 3
    assert box.count("-m venv") == 2 and not left.exists()


def test_failed_update_starts_afresh(box: Box) -> None:
    box.python("bin/python3.13", "3.13")
    box.run("launch/local.sh")
    (box.tmp / "fail-pip").touch()
    assert box.run("launch/test.sh")[0] == 1
    assert box.count("-m venv") == 1
    (box.tmp / "fail-pip").unlink()
    assert box.run("launch/local.sh")[0] == 3
    assert box.count("-m venv") == 2 and box.count("-e .[test]") == 2


@pytest.mark.parametrize("made_by_hand", [".venv/lib/x", ".venv/pyvenv.cfg"])
def test_half_made_environment_is_made_again(box: Box, made_by_hand: str) -> None:
    box.python("bin/python3.13", "3.13")
    (box.project / made_by_hand).parent.mkdir(parents=True)
    (box.project / made_by_hand).write_text("half\n")
    assert box.run("launch/local.sh")[0] == 3
    assert not (box.project / made_by_hand).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_setup_is_made_again(box: Box, number: signal.Signals) -> None:
    box.python("bin/python3.13", "3.13")
    (box.tmp / "hold-pip").touch()
    process = box.start("launch/setup.sh")
    box.wait_for("-m pip")
    os.killpg(process.pid, number)
    assert process.wait(60) in (-number, 128 + number)
    assert process.stdout.read() == ""
    process.stdout.close()
    process.stderr.close()
    (box.tmp / "hold-pip").unlink()
    assert box.run("launch/local.sh")[0] == 3
    assert box.count("-m venv") == box.count("-m pip") == 2


def test_what_a_killed_setup_left_running_is_waited_for(box: Box) -> None:
    box.python("bin/python3.13", "3.13")
    (box.tmp / "hold-pip").touch()
    first = box.start("launch/setup.sh")
    box.wait_for("-m pip")
    first.kill()  # Not its pip, which goes on writing into the environment.
    first.communicate(timeout=60)
    second = box.start("launch/local.sh")
    assert "waiting for another" in second.stderr.readline()
    assert box.count("-m venv") == 1
    (box.tmp / "hold-pip").unlink()
    second.communicate(timeout=60)
    assert second.returncode == 3
    assert box.count("-m venv") == box.count("-m pip") == 2


def test_two_at_once_install_once(box: Box) -> None:
    box.python("bin/python3.13", "3.13")
    (box.tmp / "hold-pip").touch()
    first = box.start("launch/local.sh", "first")
    box.wait_for("-m pip")
    second = box.start("launch/local.sh", "second")
    assert "waiting for another" in second.stderr.readline()
    (box.tmp / "hold-pip").unlink()
    for process, name in [(first, "first"), (second, "second")]:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 3 and out.endswith(f"{name}\n")
    assert box.count("-m venv") == box.count("-m pip") == 1


def test_convnet_venv_is_another_place_but_never_somebody_elses(box: Box) -> None:
    box.python("bin/python3.13", "3.13")
    assert box.run("launch/local.sh", CONVNET_VENV="env/here/")[0] == 3
    assert (box.tmp / "env/here/bin/python").exists()
    assert not (box.project / ".venv").exists()
    precious = box.tmp / "env/.work"
    precious.write_text("a year's\n")
    status, _, err = box.run("launch/local.sh", CONVNET_VENV=str(box.tmp / "env"))
    assert status == 2 and "CONVNET_VENV=" in err and "empty folder" in err
    assert precious.read_text() == "a year's\n"


def test_ci_runs_newest_and_oldest(box: Box) -> None:
    box.python("bin/python3.13", "3.13")
    status, out, _ = box.run(".ci/run")
    assert status == 1, "the tests' status counts"
    assert out.count("== tests") == 1 and "Python 3.11: not tested" in out
    assert box.count("-m ruff check .") == box.count("-m ruff format --check .") == 1
    assert box.count("-m mkdocs build --strict") == 1
    box.python("bin/python3.11", "3.11")
    box.run(".ci/run")
    # All tests, and in a run of its own the tutorial.
    assert box.count("python3.13 -m pytest") == 4
    assert box.count("-m docs") == box.count("python3.13 -m pytest -q -n0 -m docs") == 2
    assert box.count("python3.11 -m pytest") == 1
    assert (box.project / ".venv-3.11/bin/python").exists()


def pinned(environment: dict[str, str]) -> dict[str, str]:
    """Returns the version of each package that the pins hold in an environment."""
    found = {}
    for line in (ROOT / "launch/pins.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version, marker = re.fullmatch(
                r"([a-z0-9-]+)==([\w.]+)(?: ; (.+))?", line
            ).groups()
            if not marker or Marker(marker).evaluate(environment):
                assert name not in found, f"{name} is pinned twice in {environment}"
                found[name] = version
    return found


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_every_dependency_is_pinned(version: str, system: str) -> None:
    environment = {
        "python_version": version,
        "python_full_version": f"{version}.1",
        "sys_platform": system,
    }
    versions = pinned(environment)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    # The peers of the benchmarks live in an environment of their own.
    wanted = [row for name in extras if name != "benchmark" for row in extras[name]]
    for row in project["dependencies"] + wanted:
        requirement = Requirement(row)
        if requirement.name == project["name"]:  # an extra that includes another
            continue
        if requirement.marker and not requirement.marker.evaluate(environment):
            continue
        assert requirement.specifier.contains(versions[requirement.name]), row


def test_pins_name_no_registry_but_how_they_are_made() -> None:
    text = (ROOT / "launch/pins.txt").read_text()
    assert not re.search(r"://|--(extra-)?index|--find-links|@ ", text)
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert "uv pip compile" in " ".join(comments[:2])
