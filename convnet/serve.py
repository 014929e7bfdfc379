"""Serves a model: a page to drop pictures on, and an HTTP endpoint.

usage: python -m convnet.serve --model=M [--port=8000]

    curl -F file=@cat.jpg -F file=@dog.jpg http://127.0.0.1:8000/predict
    curl --data-binary @cat.jpg 'http://127.0.0.1:8000/predict?top=5&name=cat.jpg'

POST /predict takes a form of files, or the bytes of one picture, and answers with
predict's rows: an object for one picture, a list for several. 413: too large; 422: the
picture cannot be read; 503 with Retry-After: the queue is full. /healthz says when the
model is ready, /metrics counts in Prometheus's format.

Ctrl-C and SIGTERM: no new connection, what has been received is answered, for at most
25 seconds, and the exit status is 0.
"""

import ipaddress
import socket
from pathlib import Path
from typing import Any

from absl import flags

from convnet import cli, mesh
from convnet.errors import ConvnetError, UsageError

# Container platforms kill 30 s after the first signal.
_DRAIN_SECONDS = 25


def define(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines the flags of this app."""
    flags.DEFINE_string(
        "model",
        None,
        "a model file, a workdir, or the name of a model that ships",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "port",
        8000,
        "the port; 0 for any free one",
        lower_bound=0,
        upper_bound=65535,
        flag_values=values,
    )
    flags.DEFINE_string(
        "host",
        "127.0.0.1",
        "the address to listen on; 0.0.0.0 lets in whoever reaches this machine",
        flag_values=values,
    )
    flags.DEFINE_list(
        "names",
        [],
        "host names under which browsers reach the server, besides localhost",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "batch",
        64,
        "the largest batch; 1, 8 and this one are compiled at the start",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "queue",
        256,
        "pictures at a time; a request that does not fit is answered with 503",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_float(
        "max_megabytes", 32.0, "of a request", lower_bound=0.001, flag_values=values
    )
    flags.DEFINE_float(
        "max_megapixels", 50.0, "of a picture", lower_bound=0.001, flag_values=values
    )


def main(values: flags.FlagValues) -> None:
    """Serves until a signal comes.

    Raises:
      ConvnetError: the model, the address or the extra's packages cannot be used, the
        model does not compile, or requests were cut off at the end.
    """
    if values.model is None:
        raise UsageError("--model is missing (--help shows the usage)")
    uvicorn = _uvicorn()
    listener = _bind(values.host, values.port)
    with listener:
        mesh.start("auto")
        # After `start`, because these bring JAX up.
        from convnet import bundle as bundle_lib
        from convnet.server.app import Limits, Service
        from convnet.server.classifier import Classifier

        classifier = Classifier(bundle_lib.load(values.model), values.model)
        names = {name.lower() for name in (*values.names, values.host)}
        service = Service(
            classifier,
            title=Path(values.model).expanduser().resolve().name,
            sizes=tuple({size for size in (1, 8) if size < values.batch})
            + (values.batch,),
            limits=Limits(
                queue=values.queue,
                megabytes=values.max_megabytes,
                megapixels=values.max_megapixels,
            ),
            names=frozenset(names | {socket.gethostname().lower()}),
            on_failure=lambda: setattr(server, "should_exit", True),
            on_ready=lambda seconds: print(f"ready after {seconds:.1f} s", flush=True),
        )
        server = uvicorn.Server(
            uvicorn.Config(
                service.app,
                lifespan="on",
                ws="none",
                access_log=False,
                # Errors of the app are printed by the app, in one line.
                log_level="critical",
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=_DRAIN_SECONDS,
            )
        )
        _listen(listener, values.host, values.port)
        _announce(listener)
        try:
            server.run(sockets=[listener])
        except (KeyboardInterrupt, cli.Interrupted):
            # The server has drained, and raises the signal that it was ended by again.
            if not server.started:
                raise
    if service.failure is not None:
        raise ConvnetError(f"the model cannot be compiled: {service.failure}")
    if service.lost:
        raise ConvnetError(
            f"stopped with {service.lost} requests unanswered: {_DRAIN_SECONDS} s after"
            " the signal, or at the second Ctrl-C"
        )


def _uvicorn() -> Any:
    try:
        import python_multipart  # noqa: F401 (Starlette needs it)
        import starlette  # noqa: F401
        import uvicorn
    except ModuleNotFoundError as error:
        raise ConvnetError(
            f"serve needs the package {error.name}: run launch/setup.sh serve, or pip"
            " install 'convnet[serve]'"
        ) from error
    return uvicorn


def _bind(host: str, port: int) -> socket.socket:
    """Takes the port before the model is loaded, which may last."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UsageError(f"--host={host}: {error.strerror or error}") from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        # A port that a server has just left may be taken again at once.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _unusable(host, port, error) from error
    return listener


def _listen(listener: socket.socket, host: str, port: int) -> None:
    try:
        listener.listen(1024)
    except OSError as error:
        raise _unusable(host, port, error) from error


def _unusable(host: str, port: int, error: OSError) -> ConvnetError:
    return ConvnetError(
        f"--host={host} --port={port}: {error.strerror}; take another port, or --port=0"
        " for any free one"
    )


def _announce(listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"serving on http://{shown}:{port}/ (Ctrl-C stops)", flush=True)
    if not ipaddress.ip_address(host).is_loopback:
        print("whoever reaches this address may use it: there is no password")


if __name__ == "__main__":
    cli.run(main, define, __doc__)
