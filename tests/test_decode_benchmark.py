"""benchmarks.decode: its sides do the same work, and its table has a row for each."""

import json

import numpy as np
import pytest
from absl import flags

from benchmarks import decode as benchmark


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_all_sides_give_nearly_the_same_pixels(format):
    (data,) = benchmark.pictures((160, 120), format, 1)
    ours = benchmark._ours(data, 30).astype(int)
    for name, call in benchmark.decoders(format).items():
        pixels = call(data, 30)
        assert pixels.shape == (30, 30, 3), name
        assert np.abs(pixels - ours).mean() < 2, name


def test_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "_CASES", {"tiny": ((16, 16), "PNG", 8, 2)})
    values = flags.FlagValues()
    benchmark.define(values, [])
    output = tmp_path / "x.json"
    values(["x", "--repeats=1", "--threads=1", f"--output={output}"])
    benchmark.main(values)
    rows = json.loads(output.read_text())
    assert [row["case"] for row in rows] == ["tiny, 1 thread"] * len(rows)
    assert rows[0]["peer_name"] == "Pillow" and rows[0]["unit"] == "images/s"
    for row in rows:
        assert row["ratio"] == pytest.approx(row["ours"] / row["peer"])
