"""Other people's weights as a bundle, wherever they come from."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from convnet.bundle import Bundle
from convnet.errors import ConvnetError, UsageError
from convnet.weights import convnetjs, hub, keras, preprocessing, torch
from convnet.weights.match import Imported, Row

SOURCES = ("torchvision", "timm", "keras", "convnetjs")
_HDF5 = (".h5", ".hdf5", ".keras")
# What timm calls networks that have another name here.
TIMM_NAMES = {"mobilenetv2_100": "mobilenet_v2"}


@dataclasses.dataclass(frozen=True)
class Import:
    """A network as it was found.

    Attributes:
      bundle: the network, with labels, preprocessing and provenance.
      rows: a row for each variable; () of a ConvNetJS snapshot, whose files have no
        names to account for.
      path: the file of weights, the folder of a snapshot.
      named_by: who named the classes.
    """

    bundle: Bundle
    rows: tuple[Row, ...]
    path: Path
    named_by: str


def load(
    weights: str,
    source: str = "",
    arch: str = "",
    labels: tuple[str, ...] = (),
    *,
    allow_missing: bool = False,
    allow_unexpected: bool = False,
) -> Import:
    """Reads a network.

    Args:
      weights: a file; a folder with timm's `config.json` and `model.safetensors`, or of
        a ConvNetJS snapshot; or `hf://OWNER/NAME[@REVISION]`.
      source: one of `SOURCES`; "": by what `weights` is.
      arch: the architecture; "": by what the file holds.
      labels: the classes' names; () for those that the model brings, ImageNet's for
        1,000 outputs, else "class 0" and so on.
      allow_missing: variables that the file lacks keep their initial values.
      allow_unexpected: tensors without a place are left out.

    Raises:
      UsageError: what is named is not there, or is of another kind.
      ConvnetError: it cannot be read, or does not fit; says what.
    """
    if source and source not in SOURCES:
        raise UsageError(f"--from={source}: want one of {', '.join(SOURCES)}")
    origin: dict[str, Any] = {"weights": weights}
    if weights.startswith(hub.SCHEME):
        if source not in ("", "timm"):
            raise UsageError(
                f"--weights={weights} is a model of timm's, not {source}'s"
            )
        found = hub.download(weights)
        source, path = "timm", found.folder
        origin |= {"repository": found.repository, "revision": found.revision}
    else:
        path = Path(weights).expanduser()
    if source == "convnetjs" or (not source and any(path.glob("layer*.txt"))):
        if arch:
            raise UsageError(f"--arch={arch}: a snapshot's files say what they are")
        bundle = convnetjs.load(path, labels)
        named_by = "given" if labels else "not given; so named by default"
        return Import(bundle, (), path, named_by)
    config: dict[str, Any] = {}
    if path.is_dir():
        if source not in ("", "timm"):
            raise UsageError(f"--weights={weights} is a folder; want a file")
        config, path = hub.read_config(path), path / hub.WEIGHTS
    name = config.get("architecture", "")
    arch = arch or TIMM_NAMES.get(name, name)
    options = {"initial": allow_missing, "allow_unexpected": allow_unexpected}
    if source == "keras" or (not source and path.suffix in _HDF5):
        imported = keras.load(path, arch, **options)
    else:
        imported = torch.load(path, arch, "timm" if config else source, **options)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        if config:
            about = preprocessing.configured(imported, config)
        else:
            about = preprocessing.published(imported, digest)
        classes, named_by = _classes(imported, config, labels)
    except (TypeError, ValueError) as error:
        raise ConvnetError(f"{path.with_name(hub.CONFIG)}: {error}") from error
    origin |= {"source": imported.source, "file": path.name, "file/sha256": digest}
    bundle = Bundle(
        architecture=imported.architecture,
        task={"name": "classification", "positive": None},
        classes=classes,
        preprocessing=about,
        provenance=origin,
        variables=imported.variables,
    )
    return Import(bundle, imported.report, path, named_by)


def _classes(
    imported: Imported, config: dict[str, Any], labels: tuple[str, ...]
) -> tuple[tuple[str, ...], str]:
    """The names of the classes, and who gave them."""
    outputs = imported.architecture["num_outputs"]
    if labels:
        if len(labels) != outputs:
            raise UsageError(f"{len(labels)} labels for the {outputs} outputs")
        return labels, "given"
    if config and (names := hub.labels(config)):
        if len(names) != outputs:
            raise ValueError(f"it names {len(names)} classes for {outputs} outputs")
        return names, hub.CONFIG
    names = preprocessing.imagenet_labels()
    if len(names) == outputs:
        return names, f"ImageNet's, for {outputs:,} outputs"
    return tuple(f"class {n}" for n in range(outputs)), "not given; so named by default"
