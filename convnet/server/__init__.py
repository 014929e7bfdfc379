"""The server behind `python -m convnet.serve`: app, batches, uploads, metrics."""
