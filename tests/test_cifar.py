"""CIFAR from a local server, against TFDS's reader and the archive's own bytes."""

import hashlib
import http.server
import io
import os
import re
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest

from convnet.data import cifar
from convnet.errors import ConvnetError

COUNTS = {
    "cifar10": {f"data_batch_{i}.bin": 3 + i for i in range(1, 6)}
    | {"test_batch.bin": 4},
    "cifar100": {"train.bin": 9, "test.bin": 5},
}
FOLDERS = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}
FILES = {"cifar10": "cifar-10-binary.tar.gz", "cifar100": "cifar-100-binary.tar.gz"}
LABEL_FILES = {
    "cifar10": {"batches.meta.txt": 10},
    "cifar100": {"coarse_label_names.txt": 20, "fine_label_names.txt": 100},
}


def members(name):
    """The files of an archive: name in the archive -> bytes."""
    rng = np.random.default_rng(0)
    files = {}
    for file, count in COUNTS[name].items():
        classes = list(LABEL_FILES[name].values())
        labels = np.stack([rng.integers(0, k, count) for k in classes], axis=1)
        rows = np.concatenate([labels, rng.integers(0, 256, (count, 3072))], axis=1)
        files[file] = rows.astype(np.uint8).tobytes()
    for file, count in LABEL_FILES[name].items():
        lines = "".join(f"{file[:4]}_{i}\n" for i in range(count))
        files[file] = (lines + "\n").encode()  # CIFAR's end with an empty line
    return {f"{FOLDERS[name]}/{file}": data for file, data in files.items()}


def pack(files, extra=()):
    """A .tar.gz of files, then of `extra` TarInfo and bytes."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info, data in extra:
            tar.addfile(info, io.BytesIO(data))
    return packed.getvalue()


def about(archive):
    return {"size": len(archive), "sha256": hashlib.sha256(archive).hexdigest()}


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


def local(data_dir, name, archive):
    """Puts an archive where `prepare` looks first."""
    (data_dir / "downloads").mkdir(parents=True)
    (data_dir / "downloads" / FILES[name]).write_bytes(archive)


NOWHERE = "http://127.0.0.1:9/archive.tar.gz"  # the discard port: refused


def expected(name, split):
    """id -> (label bytes, image), straight from the archive's bytes."""
    width = len(LABEL_FILES[name])
    data = b"".join(
        data
        for file, data in members(name).items()
        if file.endswith(".bin") and (("test" in file) == (split == "test"))
    )
    rows = np.frombuffer(data, np.uint8).reshape(-1, width + 3072)
    found = {}
    for i, row in enumerate(rows):
        planes = [row[width + 1024 * c :][:1024].reshape(32, 32) for c in range(3)]
        image = np.stack(planes, axis=-1)
        found[f"{split}_{i:05d}"] = (row[:width].tolist(), image)
    return found


@pytest.mark.parametrize("name", cifar.NAMES)
def test_tfds_reads_back_every_pixel_and_label(name, serve, tmp_path):
    import tensorflow_datasets as tfds

    archive = pack(members(name))
    url, requests = serve(archive)
    path = cifar.prepare(name, tmp_path, url=url, **about(archive))
    assert path == tmp_path / name / "3.0.2"
    assert requests == [None]
    builder = tfds.builder_from_directory(path)
    sources = tfds.data_source(name, data_dir=tmp_path)
    for split in ("train", "test"):
        want = expected(name, split)
        assert builder.info.splits[split].num_examples == len(want)
        assert {r["id"].decode() for r in sources[split]} == set(want)
        for record in sources[split]:
            labels, image = want[record["id"].decode()]
            np.testing.assert_array_equal(record["image"], image)
            found = [record["coarse_label"]] if name == "cifar100" else []
            assert [*found, record["label"]] == labels
    names = builder.info.features["label"].names
    assert names[:2] == (
        ["fine_0", "fine_1"] if name == "cifar100" else ["batc_0", "batc_1"]
    )
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("name", cifar.NAMES)
def test_features_and_files_are_those_of_tfds(name, tmp_path):
    from tensorflow_datasets.image_classification import cifar as theirs

    archive = pack(members(name))
    local(tmp_path, name, archive)
    path = cifar.prepare(name, tmp_path, url=NOWHERE, **about(archive))
    builder = getattr(theirs, name.capitalize())(
        data_dir=tmp_path / "other", file_format="array_record"
    )
    (tmp_path / "features").mkdir()
    builder.info.features.save_config(tmp_path / "features")
    ours, tfds = path / "features.json", tmp_path / "features" / "features.json"
    assert ours.read_text() == tfds.read_text()
    files = {f"{name}-{s}.array_record-00000-of-00001" for s in ("train", "test")}
    files |= {"dataset_info.json", "features.json", "label.labels.txt"}
    files |= {"coarse_label.labels.txt"} if name == "cifar100" else set()
    assert {p.name for p in path.iterdir()} == files


def test_sizes_and_hashes_are_those_that_tfds_publishes():
    import tensorflow_datasets

    folder = os.path.dirname(tensorflow_datasets.__file__)
    for name, layout in cifar._LAYOUTS.items():
        with open(f"{folder}/url_checksums/{name}.txt") as file:
            url, size, sha256, saved = file.read().strip().split("\t")
        ours = layout.archive
        assert (ours.url, ours.size, ours.sha256, ours.file) == (
            url,
            int(size),
            sha256,
            saved,
        )


def test_order_is_that_of_tfds(shared_data):
    import tensorflow_datasets as tfds

    source = tfds.data_source("cifar10", data_dir=shared_data / "tfds")
    skip = {"image": tfds.decode.SkipDecoding()}
    for split, count in (("train", 50_000), ("test", 10_000)):
        found = tfds.data_source(
            "cifar10", split=split, data_dir=shared_data / "tfds", decoders=skip
        )
        order = cifar._order(split, count)[:50]
        assert [f"{split}_{i:05d}" for i in order] == [
            found[i]["id"].decode() for i in range(50)
        ]
    assert len(source["train"]) == 50_000


def test_same_archive_gives_same_bytes(tmp_path):
    archive = pack(members("cifar100"))
    made = []
    for side in (tmp_path / "a", tmp_path / "b"):
        local(side, "cifar100", archive)
        path = cifar.prepare("cifar100", side, url=NOWHERE, **about(archive))
        made.append({p.name: p.read_bytes() for p in path.iterdir()})
    assert made[0] == made[1]


def refused(call):
    """The message of the ConvnetError that `call` must raise, as lines."""
    with pytest.raises(ConvnetError) as caught:
        call()
    return str(caught.value).splitlines()


def assert_nothing_prepared(data_dir, name="cifar10"):
    assert not (data_dir / name / "3.0.2").exists()
    assert not list((data_dir / name).glob("*")) if (data_dir / name).exists() else True


def assert_says_what_to_do(lines, data_dir):
    assert len(lines) == 2, lines
    assert lines[1] == (
        f"put the archive cifar-10-binary.tar.gz into {data_dir / 'downloads'}, or "
        "prepare the dataset on another machine and set --config.data.dir"
    )


def test_refused_connection_says_what_to_do(tmp_path):
    lines = refused(lambda: cifar.prepare("cifar10", tmp_path, url=NOWHERE))
    assert_says_what_to_do(lines, tmp_path)
    assert lines[0].startswith(f"cannot download {NOWHERE}: ")
    assert "refused" in lines[0]
    assert_nothing_prepared(tmp_path)


def test_unknown_host_and_unknown_scheme(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    for url in ("http://convnet.invalid/x.tar.gz", "nonsense"):
        lines = refused(lambda url=url: cifar.prepare("cifar10", tmp_path, url=url))
        assert_says_what_to_do(lines, tmp_path)
        assert url in lines[0]


def test_silent_server_times_out(tmp_path, monkeypatch):
    import socket

    monkeypatch.setattr("convnet.data.download._TIMEOUT", 0.2)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, never answers
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x.tar.gz"
        lines = refused(lambda: cifar.prepare("cifar10", tmp_path, url=url))
    assert_says_what_to_do(lines, tmp_path)
    assert "timed out" in lines[0]


@pytest.mark.parametrize(
    ("served", "reason"),
    [
        ({"status": 404}, "the server answered 404 Not Found"),
        ({"body": b"x" * 1000}, "the server offers 1,000 bytes instead of "),
        ({"body": b"x" * 1000, "length": "none"}, "it ended after 1,000 of "),
        ({"flip": True}, "what came has the SHA-256 "),
        ({"longer": True, "length": "none"}, "what came has "),
    ],
)
def test_what_is_not_the_archive_is_refused(served, reason, serve, tmp_path):
    archive = pack(members("cifar10"))
    body = archive
    if served.pop("flip", False):
        body = archive[:-1] + bytes([archive[-1] ^ 1])
    if served.pop("longer", False):
        body = archive + b"x"
    url, _ = serve(served.pop("body", body), **served)
    call = lambda: cifar.prepare("cifar10", tmp_path, url=url, **about(archive))  # noqa: E731
    lines = refused(call)
    assert_says_what_to_do(lines, tmp_path)
    assert lines[0].startswith(f"cannot download {url}: {reason}")
    assert_nothing_prepared(tmp_path)
    assert not (tmp_path / "downloads" / FILES["cifar10"]).exists()


@pytest.mark.parametrize("ranges", [True, False])
def test_interrupted_download_is_completed_by_the_next_call(ranges, serve, tmp_path):
    archive = pack(members("cifar10"))
    cut = len(archive) // 2
    url, _ = serve(archive, cut=cut)
    lines = refused(
        lambda: cifar.prepare("cifar10", tmp_path, url=url, **about(archive))
    )
    assert_says_what_to_do(lines, tmp_path)
    assert_nothing_prepared(tmp_path)
    url, requests = serve(archive, ranges=ranges)
    path = cifar.prepare("cifar10", tmp_path, url=url, **about(archive))
    assert requests == [f"bytes={cut}-"]
    assert (path / "dataset_info.json").is_file()
    left = {p.name for p in (tmp_path / "downloads").iterdir()}
    assert left == {FILES["cifar10"], ".cifar10.lock"}


def test_wrong_local_archive_is_replaced_or_named(serve, tmp_path):
    archive = pack(members("cifar10"))
    local(tmp_path, "cifar10", b"half")
    call = lambda url: cifar.prepare("cifar10", tmp_path, url=url, **about(archive))  # noqa: E731
    lines = refused(lambda: call(NOWHERE))
    assert_says_what_to_do(lines, tmp_path)
    file = tmp_path / "downloads" / FILES["cifar10"]
    assert f"{file} has 4 bytes instead of {len(archive):,}" in lines[0]
    assert file.read_bytes() == b"half"
    url, _ = serve(archive)
    call(url)
    assert file.read_bytes() == archive


def test_prepared_dataset_is_left_alone(tmp_path):
    archive = pack(members("cifar10"))
    local(tmp_path, "cifar10", archive)
    path = cifar.prepare("cifar10", tmp_path, url=NOWHERE, **about(archive))
    times = {p: p.stat().st_mtime_ns for p in path.iterdir()}
    (tmp_path / "downloads" / FILES["cifar10"]).unlink()
    assert cifar.prepare("cifar10", tmp_path, url=NOWHERE) == path
    assert {p: p.stat().st_mtime_ns for p in path.iterdir()} == times


def link(name, kind, target):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def plain(name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info, data


BATCH = "cifar-10-batches-bin/test_batch.bin"
META = "cifar-10-batches-bin/batches.meta.txt"


@pytest.mark.parametrize(
    ("change", "extra", "reason"),
    [
        ({BATCH: None}, [], "test_batch.bin is not in cifar-10-batches-bin"),
        ({BATCH: None}, [link(BATCH, tarfile.SYMTYPE, "/etc/passwd")], "no plain file"),
        ({BATCH: None}, [link(BATCH, tarfile.LNKTYPE, META)], "no plain file"),
        ({}, [plain(BATCH, b"\0" * 3073)], "or there twice"),
        ({BATCH: b"\0" * 3073 * 10_001}, [], "30,733,073 bytes, more than 30,730,000"),
        ({BATCH: b"\0" * 3074}, [], "3,074 bytes, which is no multiple of 3,073"),
        ({BATCH: b""}, [], "0 bytes, which is no multiple"),
        ({BATCH: b"\x0a" + b"\0" * 3072}, [], "a label of test is not below 10"),
        ({META: b"a\nb\n"}, [], "batches.meta.txt has 2 names, not 10"),
        ({META: b"\xff" * 9}, [], "codec can't decode"),
    ],
)
def test_hostile_archive_is_refused(change, extra, reason, tmp_path):
    files = members("cifar10") | change
    archive = pack({k: v for k, v in files.items() if v is not None}, extra)
    local(tmp_path, "cifar10", archive)
    lines = refused(
        lambda: cifar.prepare("cifar10", tmp_path, url=NOWHERE, **about(archive))
    )
    assert len(lines) == 1
    assert str(tmp_path / "downloads" / FILES["cifar10"]) in lines[0]
    assert reason in lines[0]
    assert_nothing_prepared(tmp_path)


@pytest.mark.parametrize("archive", [b"", b"text", pack(members("cifar10"))[:-5000]])
def test_broken_archive_is_refused(archive, tmp_path):
    local(tmp_path, "cifar10", archive)
    lines = refused(
        lambda: cifar.prepare("cifar10", tmp_path, url=NOWHERE, **about(archive))
    )
    assert len(lines) == 1
    assert "is no archive of cifar-10-batches-bin" in lines[0]
    assert_nothing_prepared(tmp_path)


def test_other_members_are_not_unpacked(tmp_path):
    data_dir = tmp_path / "data"
    extra = [
        plain("../evil", b"x"),
        plain(str(tmp_path / "evil"), b"x"),
        plain("cifar-10-batches-bin/../../evil", b"x"),
        plain("cifar-10-batches-bin/readme.html", b"x"),
        link("cifar-10-batches-bin/link", tarfile.SYMTYPE, "/etc"),
    ]
    archive = pack(members("cifar10"), extra)
    local(data_dir, "cifar10", archive)
    cifar.prepare("cifar10", data_dir, url=NOWHERE, **about(archive))
    assert [p.name for p in tmp_path.iterdir()] == ["data"]
    assert not [
        p for p in data_dir.rglob("*") if p.name in ("evil", "readme.html", "link")
    ]


@pytest.mark.parametrize("place", ["", "downloads", "cifar10"])
def test_file_where_a_folder_should_be(place, tmp_path):
    data_dir = tmp_path / "data"
    file = data_dir / place if place else data_dir
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    (line,) = refused(lambda: cifar.prepare("cifar10", data_dir, url=NOWHERE))
    assert line.startswith(f"{file}: is a file where a folder should be")
    assert file.read_text() == "mine"


def test_half_made_folder_is_named_not_removed(tmp_path):
    target = tmp_path / "cifar10" / "3.0.2"
    target.mkdir(parents=True)
    (target / "mine").write_text("mine")
    (line,) = refused(lambda: cifar.prepare("cifar10", tmp_path, url=NOWHERE))
    assert line.startswith(f"{target}: ")
    assert (target / "mine").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_no_permission_names_the_path(tmp_path):
    tmp_path.chmod(0o500)
    (line,) = refused(lambda: cifar.prepare("cifar10", tmp_path, url=NOWHERE))
    assert line.startswith(f"{tmp_path / 'downloads'}: Permission denied")


# Writes past `limit` bytes of a file fail as on a full disk, until it is lifted.
FULL = """
import resource, sys
from convnet.data import cifar
from convnet.errors import ConvnetError
data_dir, url, size, sha256, limit = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
try:
    cifar.prepare("cifar10", data_dir, url=url, size=int(size), sha256=sha256)
except ConvnetError as error:
    print(error)
"""


@pytest.mark.parametrize("there", [True, False])
def test_full_disk_names_the_path_and_leaves_nothing(there, serve, tmp_path):
    archive = pack(members("cifar10"))
    url, _ = serve(archive)
    if there:
        local(tmp_path, "cifar10", archive)
    command = [sys.executable, "-c", FULL, str(tmp_path), url]
    facts = [str(value) for value in about(archive).values()]
    done = subprocess.run(
        [*command, *facts, "20000"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    (line,) = done.stdout.splitlines()
    place = "cifar10/.3.0.2.incomplete" if there else "downloads/cifar-10-binary"
    assert line.startswith(str(tmp_path / place))
    assert "File too large" in line
    assert_nothing_prepared(tmp_path)
    cifar.prepare("cifar10", tmp_path, url=url, **about(archive))  # with room again


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    archive = pack(members("cifar10"))
    local(tmp_path, "cifar10", archive)
    left = tmp_path / "cifar10" / ".3.0.2.incomplete"
    left.mkdir(parents=True)
    (left / "cifar10-train.array_record-00000-of-00001").write_bytes(b"half")
    path = cifar.prepare("cifar10", tmp_path, url=NOWHERE, **about(archive))
    assert [p.name for p in (tmp_path / "cifar10").iterdir()] == ["3.0.2"]
    assert (path / "cifar10-train.array_record-00000-of-00001").stat().st_size > 4


TOGETHER = """
import sys
from convnet.data import cifar
data_dir, url, size, sha256 = sys.argv[1:]
cifar.prepare("cifar10", data_dir, url=url, size=int(size), sha256=sha256)
"""


def test_two_processes_at_once_download_and_prepare_once(serve, tmp_path):
    archive = pack(members("cifar10"))
    url, requests = serve(archive)
    facts = [str(value) for value in about(archive).values()]
    command = [sys.executable, "-c", TOGETHER, str(tmp_path), url, *facts]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    for process in running:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors.decode()
    assert requests == [None]
    assert [p.name for p in (tmp_path / "cifar10").iterdir()] == ["3.0.2"]
