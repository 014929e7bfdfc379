"""The page: its files, made once."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from convnet.server.classifier import Classifier

_TEMPLATES = Path(__file__).resolve().parent.parent / "templates"
# A picture's answer names at most so many classes, to keep thousands of them small.
_TOP = 100


def files(
    title: str, classifier: Classifier, max_bytes: int, max_files: int
) -> dict[str, tuple[str, str]]:
    """Returns path -> (content, media type)."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    height, width, channels = classifier.shape
    html = environment.get_template("serve.html").render(
        title=title,
        classes=classifier.classes,
        kind=f"{height}×{width} pixels, {'colour' if channels == 3 else 'gray'}",
        crisp=height <= 32,
        model={
            "classes": classifier.classes,
            "top": min(_TOP, len(classifier.classes)),
            "maxBytes": max_bytes,
            "maxFiles": max_files,
        },
    )
    styles = [(_TEMPLATES / name).read_text() for name in ("report.css", "serve.css")]
    script = (_TEMPLATES / "serve.js").read_text()
    return {
        "/": (html, "text/html"),
        "/serve.css": ("\n".join(styles), "text/css"),
        "/serve.js": (script, "text/javascript"),
    }
