"""Runs the tutorial from top to bottom and keeps what it shows.

    python docs/execute.py [docs/tutorial.ipynb]

Do this after a change to the notebook: it is stored with its outputs.
"""

import sys
import time
from pathlib import Path

import nbclient
import nbformat

TUTORIAL = Path(__file__).parent / "tutorial.ipynb"
# What changes from run to run, or belongs to one machine.
_VOLATILE = ("execution", "collapsed", "scrolled")


def execute(path: Path, seconds: int = 1800) -> nbformat.NotebookNode:
    """Returns the notebook with the outputs of a fresh run.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell failed; names it.
      nbclient.exceptions.CellTimeoutError: one took longer than `seconds`.
    """
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=seconds,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    for cell in notebook.cells:
        for name in _VOLATILE:
            cell.metadata.pop(name, None)
    # Of the environment that it ran in.
    notebook.metadata.language_info = {"name": "python"}
    return notebook


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else TUTORIAL
    began = time.monotonic()
    nbformat.write(execute(path), path)
    print(f"{path}: executed in {time.monotonic() - began:.0f} s")
