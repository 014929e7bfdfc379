"""CIFAR from a local server, against TFDS's reader and the archive's own bytes."""

import dataclasses
import hashlib
import http.server
import io
import os
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from convnet.data import cifar
from convnet.errors import ConvnetError

ROOT = Path(__file__).parent.parent
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
def serve(monkeypatch, tmp_path_factory):
    """Serves an archive on the loopback: serve(archive) -> (url, requests)."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path_factory.mktemp("served")
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, form, *args):
            requests.append(args[0])

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()

    def start(archive):
        (folder / "archive.tar.gz").write_bytes(archive)
        return f"http://127.0.0.1:{server.server_port}/archive.tar.gz", requests

    yield start
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
    assert requests == ["GET /archive.tar.gz HTTP/1.1"]
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


def test_source_load_downloads_prepares_and_reads(serve, tmp_path, monkeypatch):
    from convnet.data import source

    archive = pack(members("cifar100"))
    url, requests = serve(archive)
    layout = cifar._LAYOUTS["cifar100"]
    small = dataclasses.replace(layout.archive, url=url, **about(archive))
    monkeypatch.setitem(
        cifar._LAYOUTS, "cifar100", dataclasses.replace(layout, archive=small)
    )
    data = SimpleNamespace(
        name="cifar100",
        dir=str(tmp_path),
        image_size=0,
        resize="crop",
        crop_fraction=1.0,
        interpolation="bilinear",
        test_fraction=0.2,
        train_limit=0,
        test_limit=0,
        cache="none",
    )
    dataset = source.load(data, 0)
    assert requests == ["GET /archive.tar.gz HTTP/1.1"]
    assert dataset.classes == tuple(f"fine_{i}" for i in range(100))
    for split in ("train", "test"):
        records = getattr(dataset, split)
        want = expected("cifar100", split)
        order = sorted(
            range(len(want)),
            key=lambda i, split=split: hashlib.md5(f"{split}{i}".encode()).hexdigest(),
        )
        assert len(records) == len(want)
        for i in range(len(records)):
            labels, image = want[f"{split}_{order[i]:05d}"]
            np.testing.assert_array_equal(records[i]["input"], image)
            assert records[i]["label"] == labels[1]


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

    skip = {"image": tfds.decode.SkipDecoding()}
    for split, count in (("train", 50_000), ("test", 10_000)):
        found = tfds.data_source(
            "cifar10", split=split, data_dir=shared_data / "tfds", decoders=skip
        )
        order = cifar._order(split, count)[:50]
        assert [f"{split}_{i:05d}" for i in order] == [
            found[i]["id"].decode() for i in range(50)
        ]


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


def assert_nothing_prepared(data_dir):
    assert not list((data_dir / "cifar10").glob("*"))


def test_refused_connection_says_what_to_do(tmp_path):
    lines = refused(lambda: cifar.prepare("cifar10", tmp_path, url=NOWHERE))
    assert len(lines) == 2
    assert lines[0].startswith(f"cannot download {NOWHERE}: ")
    assert lines[1].startswith(
        f"put the archive {FILES['cifar10']} into {tmp_path / 'downloads'}, or "
    )
    assert_nothing_prepared(tmp_path)


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
        cwd=ROOT,
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
    running = [
        subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) for _ in range(2)
    ]
    for process in running:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors.decode()
    assert requests == ["GET /archive.tar.gz HTTP/1.1"]
    assert [p.name for p in (tmp_path / "cifar10").iterdir()] == ["3.0.2"]
