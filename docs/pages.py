"""A hook of MkDocs: pages that are made from what is there already.

These are the tutorial, whose pictures become files, and the table of config keys.
"""

import base64
import json
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from convnet import config as config_lib

_ENDINGS = {"image/png": "png", "image/jpeg": "jpg"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds `tutorial.md`, `tutorial/NUMBER.jpg` and `reference/config.md`."""
    notebook = json.loads((Path(config.docs_dir) / "tutorial.ipynb").read_text())
    text, pictures = page(notebook)
    files.append(File.generated(config, "tutorial.md", content=text))
    for name, content in pictures.items():
        files.append(File.generated(config, name, content=content))
    files.append(File.generated(config, "reference/config.md", content=keys()))
    return files


def page(notebook: dict) -> tuple[str, dict[str, bytes]]:
    """Returns a notebook as Markdown, and its pictures by their paths in the site."""
    parts, pictures = [], {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            kinds = [kind for kind in _ENDINGS if kind in output.get("data", {})]
            if kinds:
                name = f"tutorial/{len(pictures) + 1:02d}.{_ENDINGS[kinds[0]]}"
                pictures[name] = base64.b64decode("".join(output["data"][kinds[0]]))
                number = len(pictures)
                parts.append(f"![The picture of the cell above, {number}]({name})")
            else:
                shown = output.get("text") or output["data"]["text/plain"]
                parts.append(f"```text\n{''.join(shown).rstrip()}\n```")
    return "\n\n".join(parts) + "\n", pictures


def keys() -> str:
    """Returns the page of all config keys."""
    lines = [
        "# Config keys\n",
        "An experiment sets them as `config.data.name = ...`, the command line as"
        " `--config.data.name=...`. Those with a star do not change the result.\n",
        "| key | default | meaning |",
        "| --- | --- | --- |",
    ]
    for name, key in config_lib.KEYS.items():
        default = repr(key.default)
        if isinstance(key.default, type):
            default = "the model's own"
        meaning = key.meaning.replace("|", "\\|").replace("*", "\\*")
        if key.choices:
            meaning += f" (one of {', '.join(key.choices)})"
        star = "" if key.result else " \\*"
        lines.append(f"| `{name}`{star} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"
