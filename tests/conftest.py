"""Fixtures that several test files share."""

import os
import signal
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent

# Files that take long, the longest first: one that began last would leave all workers
# but its own without work.
LONG = (
    *("main", "export", "explain_units", "experiments", "weights_keras", "stylize"),
    *("find_lr", "style", "benchmarks", "explain", "loop", "step", "gradient", "muon"),
    *("explain_attribution", "taps", "transfer", "fsdp", "architectures", "serve_run"),
    *("predict", "launch", "fused", "speednet", "verify", "checkpoint", "report"),
)

# A shell that starts us in the background has it ignored, and so would have the
# programs that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files of `LONG` first."""
    places = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data; the test is skipped where it is absent."""
    named = os.environ.get("CONVNET_TEST_DATA")
    folder = Path(named) if named else PROJECT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the shared data: no folder {folder} (CONVNET_TEST_DATA)")
    return folder
