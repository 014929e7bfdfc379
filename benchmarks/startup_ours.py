"""Our program of `benchmarks.startup`: prints when each phase of its start ended."""

import json
import sys
import time


def main() -> None:
    """Starts a run as `python -m convnet.main` does, and takes one step."""
    arguments = json.loads(sys.argv[1])
    cache = arguments.pop("cache")
    from convnet import mesh, prepare, train  # noqa: F401, I001
    import jax

    mesh.start(cache)
    ended = [("import", time.time())]
    from benchmarks import ours

    it = prepare.prepare(ours.config(**arguments))
    data = it.split("train").data
    ended.append(("data", time.time()))
    it.state = prepare.initial_state(it)
    ended.append(("state", time.time()))
    compiling: list[float] = []

    def listen(event: str, seconds: float, **_: object) -> None:
        if event.endswith("backend_compile_duration"):
            compiling.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    batch = ours.batch(it, 0, 1)
    step = ours.compile_step(it, batch)
    now = time.time()
    ended += [("trace", now - sum(compiling)), ("compile", now)]
    jax.block_until_ready(step(it.state, data, batch))
    ended.append(("first_step", time.time()))
    print(json.dumps(ended))


if __name__ == "__main__":
    main()
