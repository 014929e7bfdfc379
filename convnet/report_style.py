"""The report's figures for a style network: terms of the loss, and pictures."""

import numpy as np
from markupsafe import Markup

from convnet.report_figures import picture
from convnet.report_svg import number


def tiles(result: dict) -> list[tuple[str, str, str]]:
    """(name, figure, remark) of each term of the loss, from result.json."""
    return [
        (f"Test loss: {name}", number(result[f"test/{name}"]), f"{about}, as weighted")
        for name, about in (
            ("content", "how far the pictures are from showing the same"),
            ("style", "how far they are from being painted alike"),
            ("tv", "how rough they are"),
        )
    ]


def before_and_after(before: np.ndarray, after: np.ndarray) -> Markup:
    """Two uint8 (h, w, c) images side by side."""
    panels = "".join(
        f'<div><img src="{picture(image)}" alt="{name}"><small>{name}</small></div>'
        for name, image in (("before", before), ("after", after))
    )
    return Markup(f'<div class="maps">{panels}</div>')
