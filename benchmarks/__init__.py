"""Measurements against peers, one file a question: `python -m benchmarks.NAME`."""
