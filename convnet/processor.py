"""What this machine's processor can do."""

import functools
from pathlib import Path


def has(feature: str) -> bool:
    """Whether the processor has this feature ("avx512f"), as Linux names it.

    Elsewhere, and where the kernel does not tell, it has none.
    """
    return feature in _features()


@functools.cache
def _features() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = (line.partition(":") for line in text.splitlines())
    flags = (words for name, _, words in lines if name.strip() in ("flags", "Features"))
    return frozenset(next(flags, "").split())
