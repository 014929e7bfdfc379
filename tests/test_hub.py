"""hf:// names, against a server that answers as the Hugging Face hub does."""

import json
import time

import pytest
from hub_server import Hub

from convnet.errors import ConvnetError, UsageError
from convnet.weights import hub as hub_lib

CONFIG = {
    "architecture": "vgg16",
    "num_classes": 2,
    "pretrained_cfg": {
        "input_size": [3, 224, 224],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    },
}
FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "model.safetensors": b"weights of main" * 100,
    "pytorch_model.bin": b"a pickle",
}
NAME = "hf://timm/vgg16.test"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The server, asked instead of the real hub, with a cache of its own."""
    from huggingface_hub import constants

    server = Hub()
    server.add("timm/vgg16.test", FILES)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.close()


def offline(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def content(found):
    return (found.folder / "model.safetensors").read_bytes()


def test_only_config_and_safetensors_are_downloaded_once(hub):
    found = hub_lib.download(NAME)
    assert content(found) == FILES["model.safetensors"]
    assert hub_lib.read_config(found.folder) == CONFIG
    commit = hub.commits["timm/vgg16.test", "main"]
    assert (found.repository, found.revision) == ("timm/vgg16.test", commit)
    fetched = [
        path.rsplit("/", 1)[-1]
        for method, path in hub.requests
        if method == "GET" and "/resolve/" in path
    ]
    assert fetched == ["config.json", "model.safetensors"]
    # Both are of the commit that the branch pointed to at first.
    assert f"/timm/vgg16.test/resolve/{commit}/model.safetensors" in dict(
        (path, method) for method, path in hub.requests
    )
    del hub.requests[:]
    assert hub_lib.download(NAME) == found
    assert "GET" not in dict(hub.requests)


def test_revisions_are_pinned(hub):
    first = hub.commits["timm/vgg16.test", "main"]
    hub.add("timm/vgg16.test", FILES | {"model.safetensors": b"newer"})
    assert content(hub_lib.download(NAME)) == b"newer"
    assert content(hub_lib.download(f"{NAME}@{first}")) == FILES["model.safetensors"]
    tagged = hub.add("timm/vgg16.test", FILES | {"model.safetensors": b"v1"}, "v1.0")
    found = hub_lib.download(f"{NAME}@v1.0")
    assert (content(found), found.revision) == (b"v1", tagged)


def test_offline_reads_the_cache_and_nothing_else(hub, monkeypatch):
    found = hub_lib.download(NAME)
    offline(monkeypatch)
    del hub.requests[:]
    assert hub_lib.download(NAME) == found
    with pytest.raises(ConvnetError, match="HF_HUB_OFFLINE is set, and config.json is"):
        hub_lib.download("hf://timm/other")
    assert not hub.requests


def test_a_hub_that_cannot_be_reached_is_said(hub, monkeypatch):
    found = hub_lib.download(NAME)
    monkeypatch.setattr(
        time, "sleep", lambda seconds: None
    )  # between the library's tries
    hub.close()
    assert hub_lib.download(NAME) == found  # the cache is enough
    with pytest.raises(ConvnetError, match=f"timm/other: {hub.url} cannot be reached"):
        hub_lib.download("hf://timm/other")


@pytest.mark.parametrize(
    "name, message",
    [
        ("hf://timm/absent", "timm/absent: http://.* has no such model, or it is priv"),
        (f"{NAME}@v9", "no such revision"),
        ("hf://timm/gated", "accepted its terms"),
        ("hf://timm/pickle", r"has no model.safetensors; .* \(pickles\) are not read"),
        ("hf://timm/bare", "the model has no config.json"),
    ],
)
def test_what_is_not_there_is_named(hub, name, message):
    hub.gated.add("timm/gated")
    hub.add("timm/pickle", {k: v for k, v in FILES.items() if "safe" not in k})
    hub.add("timm/bare", {"model.safetensors": b"w"})
    with pytest.raises(ConvnetError, match=message):
        hub_lib.download(name)


@pytest.mark.parametrize("name", ["hf://vgg16", "hf://", "hf://a/b/c", "hf://a/b@"])
def test_names_have_an_owner_and_a_name(name):
    with pytest.raises(UsageError, match="want hf://OWNER/NAME"):
        hub_lib.parse(name)


def test_names_that_the_hub_forbids(hub):
    with pytest.raises(UsageError, match="no name of a model on the hub"):
        hub_lib.download("hf://timm/a--b")


def test_a_truncated_download_is_no_model_and_is_downloaded_again(hub):
    hub.cut.add("model.safetensors")
    with pytest.raises(
        ConvnetError, match="download of model.safetensors failed: .*siz"
    ):
        hub_lib.download(NAME)
    hub.cut.clear()
    assert content(hub_lib.download(NAME)) == FILES["model.safetensors"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "cannot be read: it is no JSON"),
        ("[]", "no JSON object"),
        ('{"a": 1, "a": 2}', "a key twice"),
        ('{"architectures": ["Bert"]}', "names no architecture"),
        (
            '{"architecture": "vgg16", "pretrained_cfg": 3}',
            "pretrained_cfg is no table",
        ),
        (
            '{"architecture": "vgg16", "model_args": {"act_layer": "silu"}}',
            "its model_args change the network: .'act_layer'",
        ),
        (" " * (1 << 20) + "{}", "has more than 1,048,576 bytes"),
    ],
)
def test_other_configs_are_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConvnetError, match=message):
        hub_lib.read_config(tmp_path)


def test_labels_of_a_config():
    about = {"label_names": ["n1", "n2"], "label_descriptions": {"n2": "dog"}}
    assert hub_lib.labels({"pretrained_cfg": {}}) == ()
    assert hub_lib.labels({"pretrained_cfg": {}} | about) == ("n1", "dog")
    assert hub_lib.labels({"pretrained_cfg": about}) == ("n1", "dog")
    assert hub_lib.labels(about | {"architecture": "vgg16"}) == ("n1", "dog")
    for wrong in ("cat", [1, 2], [["a"]], 3):
        with pytest.raises(ValueError, match="no list of names"):
            hub_lib.labels({"label_names": wrong})
