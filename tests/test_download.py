"""Downloads from a server on the loopback that fails in every way a server can."""

import hashlib
import http.server
import re
import socket
import threading

import pytest

from convnet.data import download
from convnet.errors import ConvnetError

BODY = bytes(range(256)) * 3000  # three chunks
NOWHERE = "http://127.0.0.1:9/x.tar.gz"  # the discard port: refused


@pytest.fixture
def serve(monkeypatch):
    """Starts servers on the loopback: serve(body, ...) -> (url, requests)."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def start(body, *, status=200, cut=None, length=None, ranges=True):
        """`cut` bytes are sent before the connection closes; `length` is announced."""
        requests = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range")
                requests.append(asked)
                start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0
                start = start if ranges else 0
                self.send_response(206 if start else status)
                if start:
                    last = f"{len(body) - 1}/{len(body)}"
                    self.send_header("Content-Range", f"bytes {start}-{last}")
                if length != "none":
                    self.send_header("Content-Length", length or len(body) - start)
                self.end_headers()
                self.wfile.write(body[start:cut])

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.daemon = True
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}/archive.tar.gz", requests

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join(10)


def archive(url):
    return download.Archive(
        "x.tar.gz", url, len(BODY), hashlib.sha256(BODY).hexdigest()
    )


def refused(url, folder):
    """The first line of the error, once the second says what to do."""
    with pytest.raises(ConvnetError) as caught:
        download.obtain(archive(url), folder)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"cannot download {url}: ")
    assert second == (
        f"put the archive x.tar.gz into {folder}, or prepare the dataset on another "
        "machine and set --config.data.dir"
    )
    return first.removeprefix(f"cannot download {url}: ")


def test_archive_is_fetched_whole_and_only_once(serve, tmp_path):
    url, requests = serve(BODY)
    for _ in range(2):
        path = download.obtain(archive(url), tmp_path)
        assert path.read_bytes() == BODY
    assert requests == [None]
    assert [p.name for p in tmp_path.iterdir()] == ["x.tar.gz"]


def test_archive_of_unannounced_length_is_fetched(serve, tmp_path):
    url, _ = serve(BODY, length="none")
    assert download.obtain(archive(url), tmp_path).read_bytes() == BODY


def test_refused_connection(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert "Connection refused" in refused(NOWHERE, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("url", ["http://convnet.invalid/x.tar.gz", "nonsense"])
def test_unknown_host_and_unknown_scheme(url, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    assert refused(url, tmp_path)


def test_silent_server_times_out(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_TIMEOUT", 0.2)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, never answers
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x.tar.gz"
        assert "timed out" in refused(url, tmp_path)


def test_what_is_no_http_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"SSH-2.0-x\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x.tar.gz"
        assert "SSH-2.0-x" in refused(url, tmp_path)
        thread.join(10)


@pytest.mark.parametrize(
    ("body", "served", "reason"),
    [
        (BODY, {"status": 404}, "the server answered 404 Not Found"),
        (BODY, {"status": 503}, "the server answered 503 Service Unavailable"),
        (b"x" * 1000, {}, "the server offers 1,000 bytes instead of 768,000"),
        (b"x" * 1000, {"length": "none"}, "it ended after 1,000 of 768,000 bytes"),
        (BODY[:-1] + b"x", {}, "what came has the SHA-256 "),
        (BODY + b"x", {"length": "none"}, "what came has 768,001 bytes instead of"),
        (BODY * 9, {"length": "none"}, "what came has "),
    ],
)
def test_what_is_not_the_archive_is_refused(body, served, reason, serve, tmp_path):
    url, _ = serve(body, **served)
    assert refused(url, tmp_path).startswith(reason)
    assert not (tmp_path / "x.tar.gz").exists()
    url, _ = serve(BODY)  # and it does not stand in the way of the next try
    if body == b"x" * 1000:  # what ended early is continued, and found out
        (tmp_path / "x.tar.gz.part").unlink(missing_ok=True)
    assert download.obtain(archive(url), tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("ranges", [True, False])
def test_interrupted_download_is_completed_by_the_next_call(ranges, serve, tmp_path):
    url, _ = serve(BODY, cut=500_000)
    assert refused(url, tmp_path)
    assert not (tmp_path / "x.tar.gz").exists()
    url, requests = serve(BODY, ranges=ranges)
    assert download.obtain(archive(url), tmp_path).read_bytes() == BODY
    assert requests == ["bytes=500000-"]
    assert [p.name for p in tmp_path.iterdir()] == ["x.tar.gz"]


def test_a_wrong_beginning_is_found_out_and_dropped(serve, tmp_path):
    (tmp_path / "x.tar.gz.part").write_bytes(b"x" * 1000)
    url, _ = serve(BODY)
    assert refused(url, tmp_path).startswith("what came has the SHA-256 ")
    assert download.obtain(archive(url), tmp_path).read_bytes() == BODY


def test_wrong_local_archive_is_named_then_replaced(serve, tmp_path):
    file = tmp_path / "x.tar.gz"
    file.write_bytes(b"half")
    reason = refused(NOWHERE, tmp_path)
    assert reason.endswith(f"; {file} has 4 bytes instead of 768,000")
    assert file.read_bytes() == b"half"
    url, _ = serve(BODY)
    assert download.obtain(archive(url), tmp_path).read_bytes() == BODY
