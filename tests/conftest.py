"""Fixtures that several test files share."""

import os
import signal
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent

# A shell that starts us in the background has it ignored, and so would have the
# programs that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data; the test is skipped where it is absent."""
    named = os.environ.get("CONVNET_TEST_DATA")
    folder = Path(named) if named else PROJECT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the shared data: no folder {folder} (CONVNET_TEST_DATA)")
    return folder
