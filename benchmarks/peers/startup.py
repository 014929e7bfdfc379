"""PyTorch's program of `benchmarks.startup`: prints when each phase of it ended."""

import json
import os
import sys
import time


def main() -> None:
    """Takes one train step on the images of an .npz, and a second one if compiled.

    Compilation is then what the first step takes more than the second.
    """
    arguments = json.loads(sys.argv[1])
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = arguments["cache"]
    import torch

    from benchmarks.peers import protocol, train_step

    protocol.keep_heap()
    gpu = arguments["device"] == "gpu"
    torch.zeros(1, device="cuda" if gpu else "cpu")
    ended = [("import", time.time())]
    names = ("network", "dtype", "batch", "width", "device")
    chosen = {name: arguments[name] for name in names}
    side = train_step.Side(size=32, images=4 * arguments["batch"], **chosen)
    ended.append(("state", time.time()))
    kind = "float32" if arguments["dtype"] == "float32" else "autocast"
    way = side.make("train", kind, arguments["compiled"])
    first = side.run(way, 1)
    now = time.time()
    if arguments["compiled"]:
        second = side.run(way, 1)
        ended.append(("compile", now - min(first, second)))
    ended.append(("first_step", now))
    print(json.dumps(ended))


if __name__ == "__main__":
    main()
