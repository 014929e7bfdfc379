"""ONNX Runtime on exported models: inputs as stored in, probabilities out."""

import os
import time

import numpy as np

from benchmarks.peers import protocol


def main() -> None:
    """Serves one model at a time, on the batch that it was given."""
    import onnxruntime

    protocol.keep_heap()
    held = {}

    def load(path: str) -> str:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
        held["session"] = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        return onnxruntime.__version__

    def images(path: str) -> None:
        held["images"] = np.load(path)

    def run(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            held["session"].run(None, {"inputs": held["images"]})
        return time.perf_counter() - start

    protocol.serve({"load": load, "images": images, "run": run})


if __name__ == "__main__":
    main()
