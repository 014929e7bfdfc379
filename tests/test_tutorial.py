"""The tutorial: what is stored of it, and that it runs.

The run takes minutes and needs the extra `docs`, so it has a marker: `launch/test.sh -m
docs` runs it, as `.ci/run` does. It is the notebook as a student gets it, not a shorter
one: a shrunken run would not show that it ends in time, nor that it teaches what it
says.
"""

import importlib.util
import json
import re
import resource
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
TUTORIAL = DOCS / "tutorial.ipynb"
PICTURES = ("image/png", "image/jpeg")
LONGEST = 2 * 600  # CPU seconds: ten minutes on two cores


def cells_of(notebook):
    """Each cell with its source as one string."""
    return [cell | {"source": "".join(cell["source"])} for cell in notebook["cells"]]


def texts(cell):
    """All that a code cell shows as text."""
    for output in cell["outputs"]:
        if output["output_type"] == "error":
            yield output["ename"]
        elif output["output_type"] == "stream":
            yield "".join(output["text"])
        else:
            yield "".join(output["data"].get("text/plain", ""))


def pictures(cell):
    return [
        output
        for output in cell.get("outputs", ())
        if any(kind in output.get("data", {}) for kind in PICTURES)
    ]


def check_outputs(cells):
    """No errors, nothing on stderr, no warnings; every picture has its caption."""
    figure = 0
    for cell, following in zip(cells, [*cells[1:], None], strict=True):
        if cell["cell_type"] != "code":
            continue
        for output in cell["outputs"]:
            assert output["output_type"] != "error", cell["source"]
            assert output.get("name") != "stderr", output["text"]
        for text in texts(cell):
            assert "warn" not in text.lower(), text
        if pictures(cell):
            figure += 1
            assert following["source"].startswith(f"*Figure {figure}. ")
            assert following["source"].endswith("*")
    assert figure > 20


def test_the_notebook_carries_the_outputs_of_one_run():
    cells = cells_of(json.loads(TUTORIAL.read_text()))
    counts = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    check_outputs(cells)
    assert TUTORIAL.stat().st_size < 3e6


def test_every_exercise_has_a_solution():
    cells = cells_of(json.loads(TUTORIAL.read_text()))
    text = "\n".join(c["source"] for c in cells if c["cell_type"] == "markdown")
    asked, solved = text.split("## 12. Solutions")
    there = re.compile(r"\*\*Exercise (\d+)\.\*\*")
    assert there.findall(asked) == there.findall(solved) == list("123456789")


def test_the_notebook_names_no_machine_and_loads_nothing_from_the_network():
    text = TUTORIAL.read_text()
    sources = "\n".join(cell["source"] for cell in cells_of(json.loads(text)))
    assert "://" not in sources and "/home/" not in text


@pytest.mark.docs
def test_it_runs_from_top_to_bottom_in_time():
    pytest.importorskip("nbclient", reason="needs the extra docs")
    spec = importlib.util.spec_from_file_location("execute", DOCS / "execute.py")
    execute = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(execute)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    cells = cells_of(execute.execute(TUTORIAL))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Not by the clock: other programs may have the cores.
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert 20 < used < LONGEST
    check_outputs(cells)
    shown = "\n".join(
        text for cell in cells if cell["cell_type"] == "code" for text in texts(cell)
    )
    # What the text around says: the digits and the series are learnt, and a head alone
    # tells the cat from the temple.
    assert float(re.search(r"([\d.]+)% of 360 digits", shown)[1]) > 97
    assert float(re.search(r"([\d.]+)% of 3,000 series", shown)[1]) > 99
    assert float(re.search(r"new head: ([\d.]+)% of the test", shown)[1]) > 95
