"""Keeping the colours of the content.

Gatys, Bethge, Hertzmann and Shechtman 2016, "Preserving color in neural artistic style
transfer", arXiv:1606.05897.
"""

import numpy as np

# RGB -> YIQ (NTSC 1953): luminance, and two numbers of colour.
_YIQ = np.array(
    [
        [0.299, 0.587, 0.114],
        [0.595716, -0.274453, -0.321263],
        [0.211456, -0.522591, 0.311135],
    ]
)
_RGB = np.linalg.inv(_YIQ)
_LEAST_VARIANCE = 1e-5


def luminance(picture: np.ndarray) -> np.ndarray:
    """(h, w, 3) -> (h, w, 1)."""
    return (picture @ _YIQ[0])[..., None].astype(np.float32)


def matched_luminance(style: np.ndarray, content: np.ndarray) -> np.ndarray:
    """Shifts and scales one luminance to the mean and deviation of another.

    Section 3.2, equation 10: a style that is darker than the content would spend its
    strokes on making it darker.

    Args:
      style, content: (h, w, 1), of any sizes.

    Returns:
      float32 of the style's shape.
    """
    ratio = content.std() / max(float(style.std()), 1e-6)
    return (ratio * (style - style.mean()) + content.mean()).astype(np.float32)


def with_luminance(content: np.ndarray, grey: np.ndarray) -> np.ndarray:
    """Returns the content's colours with another luminance, float32 (h, w, 3).

    Where no colour of the screen has both, the colour is made paler, its hue kept, so
    that the luminance stays what it is.

    Args:
      content: (h, w, 3), 0 to 1.
      grey: (h, w, 1), 0 to 1.
    """
    yiq = content @ _YIQ.T
    colour = yiq.copy()
    colour[..., 0] = 0
    offset = colour @ _RGB.T  # what is added to grey, by channel
    room = np.where(offset > 0, 1 - grey, grey) / np.maximum(np.abs(offset), 1e-9)
    share = np.minimum(room.min(-1, keepdims=True), 1)
    return np.clip(grey + share * offset, 0, 1).astype(np.float32)


def matched_colours(style: np.ndarray, content: np.ndarray) -> np.ndarray:
    """Gives one picture the colours of another: mean and covariance of RGB.

    Section 3.1, equation 5 with the symmetric root, which "image analogies" use and
    which changes the least.

    Args:
      style, content: (h, w, 3), of any sizes.

    Returns:
      float32 of the style's shape, clipped to 0 and 1.
    """
    ours, wanted = (
        picture.reshape(-1, 3).astype(np.float64) for picture in (style, content)
    )
    change = _root(np.cov(wanted.T)) @ np.linalg.inv(_root(np.cov(ours.T)))
    moved = (ours - ours.mean(0)) @ change.T + wanted.mean(0)
    return np.clip(moved, 0, 1).reshape(style.shape).astype(np.float32)


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, _LEAST_VARIANCE))) @ vectors.T
