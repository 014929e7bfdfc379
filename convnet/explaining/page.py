"""The page: one HTML file that needs no network and no other file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convnet.report_svg import number, percent

_TEMPLATES = Path(__file__).resolve().parent.parent / "templates"


def render(contents: Mapping[str, Any]) -> bytes:
    """Returns the page.

    `contents` has what the template explain.html names. It holds no script, and may
    run none, whatever a class or a file is called.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent}
    page = environment.get_template("explain.html").render(**contents)
    # A file name need not be text: what UTF-8 cannot hold is shown as an escape.
    return page.encode("utf-8", "backslashreplace")
