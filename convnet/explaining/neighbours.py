"""The inputs of a collection that are most alike in a network's feature space."""

from collections.abc import Iterable
from typing import Any

import numpy as np


def nearest(
    queries: np.ndarray,
    batches: Iterable[tuple[list[Any], np.ndarray]],
    count: int,
) -> list[list[tuple[float, Any]]]:
    """Finds the `count` items of the largest cosine similarity to each query.

    Args:
      queries: features (n, ...).
      batches: items, and their features (m, ...); only the best are kept in memory.
      count: at most so many are returned.

    Returns:
      For each query (similarity, item), the most similar first; of equals, the earlier
      one first.
    """
    wanted = _unit(queries)
    best: list[list[tuple[float, Any]]] = [[] for _ in wanted]
    for items, features in batches:
        similarity = wanted @ _unit(features).T
        for row, found in zip(similarity, best, strict=True):
            order = np.argsort(-row, kind="stable")[:count]
            found += [(float(row[i]), items[i]) for i in order]
            found.sort(key=lambda pair: -pair[0])
            del found[count:]
    return best


def _unit(features: np.ndarray) -> np.ndarray:
    flat = np.asarray(features, np.float32).reshape(len(features), -1)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    return flat / np.where(length == 0, 1, length)
