"""Models of the Hugging Face hub, `hf://OWNER/NAME[@REVISION]`, in timm's layout.

Two files of a repository are read: `config.json` and `model.safetensors`; a pickle
never is. The library huggingface_hub keeps them in its cache, and reads where the hub
is (HF_ENDPOINT), whether to ask it at all (HF_HUB_OFFLINE) and who asks (HF_TOKEN) from
the environment.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

from convnet import tensorfile
from convnet.errors import ConvnetError, UsageError

SCHEME = "hf://"
WEIGHTS, CONFIG = "model.safetensors", "config.json"

_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@(\S+))?", re.ASCII)
_MOST_CONFIG = 1 << 20  # bytes
# Arguments of timm's that change no logits, or that the tensors tell.
_HARMLESS = {"num_classes", "in_chans", "drop_rate", "drop_path_rate", "img_size"}


@dataclasses.dataclass(frozen=True)
class Download:
    """A model of the hub, on this machine.

    Attributes:
      folder: holds `config.json` and `model.safetensors`.
      repository: "OWNER/NAME".
      revision: the commit, whatever the name said.
    """

    folder: Path
    repository: str
    revision: str


def parse(name: str) -> tuple[str, str | None]:
    """Returns repository and revision, None for the newest.

    Raises:
      UsageError: it is no name of a model on the hub.
    """
    match = _NAME.fullmatch(name.removeprefix(SCHEME))
    if not match:
        raise UsageError(f"{name}: want hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    return match[1], match[2]


def download(name: str) -> Download:
    """Brings a model into the library's cache, unless it is there.

    Args:
      name: "hf://timm/vgg16.tv_in1k", or with a branch, a tag or a commit behind an @.

    Raises:
      UsageError: it is no name of a model on the hub.
      ConvnetError: there is no such model, revision or file, the hub cannot be reached
        or is not to be asked, or the download broke off.
    """
    repository, revision = parse(name)
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    commit, file = revision, CONFIG
    try:
        # The weights are those of the commit whose config was read.
        for file in (CONFIG, WEIGHTS):
            path = Path(
                huggingface_hub.hf_hub_download(repository, file, revision=commit)
            )
            commit = path.parent.name
    except Exception as error:  # the library's transports raise almost anything
        raise _explained(name, file, error) from error
    return Download(path.parent, repository, commit)


def _explained(name: str, file: str, error: Exception) -> ConvnetError:
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"{name}: no name of a model on the hub: {error}")
    if isinstance(error, errors.GatedRepoError):
        why = f"{hub} gives it only to those who accepted its terms (set HF_TOKEN)"
    elif isinstance(error, errors.RepositoryNotFoundError):
        why = f"{hub} has no such model, or it is private (then set HF_TOKEN)"
    elif isinstance(error, errors.RevisionNotFoundError):
        why = f"the model has no such revision at {hub}"
    elif isinstance(error, errors.LocalEntryNotFoundError):
        why = f"{hub} cannot be reached, and {file} is not in {constants.HF_HUB_CACHE}"
        if constants.is_offline_mode():
            why = (
                f"HF_HUB_OFFLINE is set, and {file} is not in {constants.HF_HUB_CACHE}:"
                " run once without it"
            )
    elif isinstance(error, errors.EntryNotFoundError):
        why = f"the model has no {file}"
        if file == WEIGHTS:
            why += "; weights in other files (pickles) are not read"
    else:
        text = " ".join(str(error).split())
        why = f"the download of {file} failed: {text[:300]}; run the same command again"
    return ConvnetError(f"{name}: {why}")


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the `config.json` of a folder, {} where there is none.

    Raises:
      ConvnetError: it is malformed, or is not timm's.
    """
    path = folder / CONFIG
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > _MOST_CONFIG:
            raise ValueError(f"it has more than {_MOST_CONFIG:,} bytes")
        config = tensorfile.parse_json(path.read_bytes(), "it")
    except (OSError, ValueError) as error:
        raise ConvnetError(f"{path} cannot be read: {error}") from error
    if not isinstance(config.get("architecture"), str):
        raise ConvnetError(f"{path} names no architecture: it is no config of timm's")
    if not isinstance(pretrained(config), dict):
        raise ConvnetError(f"{path}: its pretrained_cfg is no table")
    if args := set(config.get("model_args") or {}) - _HARMLESS:
        raise ConvnetError(
            f"{path}: its model_args change the network: {tensorfile.shorten(args)}"
        )
    return config


def pretrained(config: dict[str, Any]) -> dict[str, Any]:
    """What a config says of the weights; an older layout has one level."""
    return config.get("pretrained_cfg", config)


def labels(config: dict[str, Any]) -> tuple[str, ...]:
    """Returns the names of the classes, () where a config does not say them.

    Where there are descriptions of the names (`label_descriptions`), these are taken.

    Raises:
      ValueError: they are no names.
    """
    about = pretrained(config)
    names = config.get("label_names", about.get("label_names")) or []
    words = config.get("label_descriptions", about.get("label_descriptions")) or {}
    if isinstance(words, dict) and isinstance(names, list):
        names = [
            words.get(name, name) if isinstance(name, str) else name for name in names
        ]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("its label_names are no list of names")
    return tuple(names)
