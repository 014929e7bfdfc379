"""Thousands of damaged images; CONVNET_FUZZ_INPUTS=10000 for the long run."""

import os

from fuzz_decode import run


def test_damaged_images_end_as_pixels_or_decode_errors():
    inputs = int(os.environ.get("CONVNET_FUZZ_INPUTS", 600))
    found = run(inputs, seed=0)
    assert not (found.crashes or found.hangs or found.others), found
    assert found.decoded + found.refused == inputs
    assert found.decoded and found.refused
    assert found.peak < 2 << 30
