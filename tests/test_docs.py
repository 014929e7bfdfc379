"""The pages: their commands have flags that exist, and their code runs."""

import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from convnet import cli, train

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
TAKES_PATHS = ("predict", "explain")


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands():
    """All commands of convnet on the pages, as lists of words."""
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                # What comes before a pipe is not ours.
                words = shlex.split(line.split("|")[-1], comments=True)
                if words[:2] == ["python", "-m"] and words[2].startswith("convnet."):
                    yield pytest.param(
                        words[2:], id=f"{page.stem}-{' '.join(words[2:])}"
                    )


@pytest.mark.parametrize("words", list(commands()))
def test_a_command_of_a_page_is_one_that_the_app_takes(words, tmp_path, monkeypatch):
    name, *arguments = words
    app = importlib.import_module(name)
    # Experiments that a page lets the reader write.
    monkeypatch.chdir(tmp_path)
    for code in blocks(ROOT / "docs" / "series.md", "python"):
        if "get_config" in code:
            Path("machines.py").write_text(code)
    assert "..." not in arguments
    rest = [] if name.split(".")[1] in TAKES_PATHS else None
    cli.parse([name, *arguments], app.define, "", rest)


def test_from_the_csv_file_to_a_trained_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make, arrays, experiment, _ = blocks(ROOT / "docs" / "series.md", "python")
    for name, code in (("make", make), ("arrays", arrays), ("machines", experiment)):
        Path(f"{name}.py").write_text(code)
    runpy.run_path("make.py")
    shown = blocks(ROOT / "docs" / "series.md", "text")
    assert Path("machines.csv").read_text().startswith(shown[0])
    runpy.run_path("arrays.py")
    assert capsys.readouterr().out == shown[1]
    config = runpy.run_path("machines.py")["get_config"]()
    config.train.epochs = 8.0
    config.train.eval_every = 0.0
    result = train.run(config, Path("run"), "")
    # Two thirds of the series are sound.
    assert result["test/examples"] == 60 and result["test/accuracy"] > 0.9
    about = json.loads(Path("run/config.json").read_text())
    assert about["data"]["name"] == "arrays"


def build(folder, text=""):
    """Builds a copy of the site whose first page ends in `text`."""
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    shutil.copytree(ROOT / "docs", folder / "docs")
    first = folder / "docs" / "index.md"
    first.write_text(first.read_text() + text)
    settings = (ROOT / "mkdocs.yml").read_text()
    (folder / "mkdocs.yml").write_text(
        settings.replace("paths: [.]", f"paths: [{ROOT}]")
    )
    # The options of the script that builds the real one.
    words = shlex.split((ROOT / "launch" / "docs.sh").read_text().splitlines()[-1])
    options = words[words.index("mkdocs") + 1 : -1]
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.mark.docs
@pytest.mark.parametrize("link", ["nothing.md", "train.md#nothing"])
def test_a_broken_link_is_an_error(link, tmp_path):
    built = build(tmp_path, f"\n[a link]({link})\n")
    assert built.returncode == 1 and "nothing" in built.stderr, built.stderr


@pytest.mark.docs
def test_the_site_needs_no_network(tmp_path):
    built = build(tmp_path)
    assert built.returncode == 0, built.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        loaded = re.findall(r"<(?:script|img|link)[^>]*://[^>]*>", page.read_text())
        assert not loaded, page
        for name in re.findall(r'<(?:script|img)[^>]* src="([^"]+)"', page.read_text()):
            if page.name != "404.html" and not name.startswith("data:"):
                assert (page.parent / name.split("?")[0]).exists(), (page, name)
