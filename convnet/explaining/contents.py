"""Everything that the page shows, method after method, each on a clock of its own."""

import contextlib
import dataclasses
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from convnet.explaining import drawing, layers, neighbours, sections, study, texts
from convnet.explaining.album import Album
from convnet.explaining.answers import Answers, Target
from convnet.explaining.network import Network

TOP = 5  # classes whose probability is shown
NEAREST = 6  # training examples


@dataclasses.dataclass(frozen=True)
class Collection:
    """Training examples to look for neighbours in.

    Attributes:
      batches: given the function of inputs as stored -> features, yields items and
        their features.
      look_up: an item -> its input as stored, and its name.
    """

    batches: Callable[[Callable], Iterator[tuple[list[Any], np.ndarray]]]
    look_up: Callable[[Any], tuple[np.ndarray, str]]


class Clock:
    """Seconds of each method, as they are spent; said on standard error."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, method: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        spent = time.perf_counter() - start
        self.seconds[method] = self.seconds.get(method, 0.0) + spent
        print(f"{method:20} {spent:6.1f} s", file=sys.stderr)


class Contents:
    """Makes the parts of the page for some inputs of one network.

    Args:
      network, answers: of one model file.
      album: takes the drawings.
      methods: those of `texts.METHODS` that are wanted.
      layer: the tap for class activation maps and units.
    """

    def __init__(
        self,
        network: Network,
        answers: Answers,
        album: Album,
        methods: Sequence[str],
        layer: str,
    ) -> None:
        self._network, self._answers, self._album = network, answers, album
        self._methods, self._layer = list(methods), layer
        if len(network.outputs) > 1:
            # They average the gradient over all places: of an answer for one place
            # they would say nothing.
            self._methods = [m for m in methods if not m.startswith("grad_cam")]
        about = network.bundle.preprocessing
        self._this = texts.THIS[drawing.kind(network.shape, about["input_dtype"])]
        maps = layers.maps(network.shapes, network.rank)
        every = layers.stages(maps, len(maps))
        self._stages = layers.stages(maps, sections.STAGES)
        self._left_out = len(every) - len(self._stages)
        # What a person asks for is drawn, in whichever block it is.
        self._stages += [s for s in every if layer in s[1] and s not in self._stages]
        self.clock = Clock()

    def make(
        self,
        names: Sequence[str],
        stored: np.ndarray,
        index: tuple[int, ...] | None,
        collection: Collection | None,
    ) -> dict[str, Any]:
        """Returns what the template needs, and "rows" for explain.json.

        Args:
          names: of n inputs.
          stored: (n, *shape), as they are stored.
          index: the answer to explain; None for each input's own strongest one.
          collection: of training examples; None for none.
        """
        examples = self._examples(names, stored, index, collection) if names else []
        return {
            "this": self._this,
            "broad": "" if self._this == "picture" else " broad",
            "steps": texts.STEPS.values(),
            "colour": self._network.shape[-1] == 3,
            "channels": sections.CHANNELS,
            "stages_left_out": self._left_out,
            "examples": examples,
            "filters": self._filters(),
            "fields": self._fields(stored),
            "wishes": self._wishes(stored, examples),
            "seconds": self.clock.seconds,
        }

    def _examples(
        self,
        names: Sequence[str],
        stored: np.ndarray,
        index: tuple[int, ...] | None,
        collection: Collection | None,
    ) -> list[dict[str, Any]]:
        x = self._network.normalize(stored)
        with self.clock("answers"):
            logits = self._network.logits(x)
        targets = [
            self._answers.target(index or self._answers.strongest(row))
            for row in logits
        ]
        folders = [folder(place, name) for place, name in enumerate(names, 1)]
        examples = [
            self._header(*row)
            for row in zip(names, stored, logits, targets, folders, strict=True)
        ]
        studied = study.Study(self._network, self._answers, x, self._layer)
        for method in study.METHODS:
            if method in self._methods:
                with self.clock(method):
                    finding = studied.run(method, targets)
                panels = sections.attribution(
                    finding, method, targets, stored, self._album, folders
                )
                for row, (example, panel) in enumerate(
                    zip(examples, panels, strict=True)
                ):
                    example["why"].append(panel)
                    if finding.errors is not None:
                        example["completeness_error"] = float(finding.errors[row])
                        example["steps"] = int(finding.steps[row])
        if "grad_cam" in self._methods and len(self._answers.labels) > 2:
            self._classes(studied, logits, stored, examples, folders)
        if "feature_maps" in self._methods:
            with self.clock("feature_maps"):
                for row, example in enumerate(examples):
                    example["stages"] = sections.feature_maps(
                        self._network,
                        x[row : row + 1],
                        self._stages,
                        self._album,
                        folders[row],
                    )
        if "nearest" in self._methods and collection is not None:
            with self.clock("nearest"):
                self._neighbours(x, collection, examples, folders)
        return examples

    def _header(
        self,
        name: str,
        stored: np.ndarray,
        logits: np.ndarray,
        target: Target,
        folder: str,
    ) -> dict[str, Any]:
        top, forecast = [], None
        if self._answers.labels:
            probabilities = self._answers.probabilities(logits[None])[0]
            order = np.argsort(-probabilities, kind="stable")[:TOP]
            top = [(self._answers.labels[i], float(probabilities[i])) for i in order]
        elif logits.ndim == 3:
            drawn = drawing.forecast(logits, target.index)
            note = f"The forecast; the cross is {target.label}."
            forecast = self._album.add(f"{folder}/forecast", drawn, "", note)
        note = f"The {self._this} as the network gets it."
        if self._this == "input" and stored.ndim > 3:
            note += " The first map is the oldest, or the first channel."
        drawn = drawing.example(stored)
        return {
            "name": name,
            "title": re.split(r"[/\\]", name)[-1],
            "folder": folder,
            "input": self._album.add(f"{folder}/input", drawn, "", note),
            "forecast": forecast,
            "top": top,
            "value": float((logits * target.direction).sum()),
            "label": target.label,
            "why": [],
            "classes": [],
            "stages": [],
            "neighbours": [],
        }

    def _classes(
        self,
        studied: study.Study,
        logits: np.ndarray,
        stored: np.ndarray,
        examples: list[dict[str, Any]],
        folders: Sequence[str],
    ) -> None:
        """Grad-CAM for the most probable classes of each input."""
        ranks = np.argsort(-self._answers.probabilities(logits), 1, kind="stable")
        with self.clock("grad_cam"):
            for rank in range(min(TOP, ranks.shape[1])):
                targets = [self._answers.target((int(row[rank]),)) for row in ranks]
                heat = studied.run("grad_cam", targets).heat
                for row, example in enumerate(examples):
                    label = targets[row].label
                    file = f"{folders[row]}/grad_cam-{rank + 1}-{slug(label)}"
                    drawn = drawing.relevance(stored[row], heat[row], False)
                    example["classes"].append(self._album.add(file, drawn, label))

    def _neighbours(
        self,
        x: np.ndarray,
        collection: Collection,
        examples: list[dict[str, Any]],
        folders: Sequence[str],
    ) -> None:
        network = self._network
        name = [tap for tap in network.shapes if tap.startswith("base/")][-1]

        def features(inputs: np.ndarray) -> np.ndarray:
            return network.features(network.normalize(inputs), name)

        found = neighbours.nearest(
            network.features(x, name), collection.batches(features), NEAREST
        )
        for example, row, folder in zip(examples, found, folders, strict=True):
            example["neighbours"] = sections.neighbours(
                row, collection.look_up, self._album, folder
            )

    def _filters(self) -> Any:
        if "filters" not in self._methods:
            return None
        with self.clock("filters"):
            return sections.filters(self._network, self._album)

    def _fields(self, stored: np.ndarray) -> Any:
        if "receptive_field" not in self._methods:
            return None
        first = stored[:1] if len(stored) else None
        with self.clock("receptive_field"):
            fields = sections.fields_of(self._network)
            return sections.receptive_fields(
                self._network, fields, self._stages, first, self._album
            )

    def _wishes(
        self, stored: np.ndarray, examples: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """What the classes look for, and units of the layer that answer to the input.

        With many classes, those that the inputs' answers name.
        """
        if "optimized" not in self._methods:
            return []
        most = min(sections.UNITS, max(2, self._network.batch_size // 2))
        parts: list[tuple[str, str, list[int], list[str]]] = []
        labels = self._answers.labels
        if len(labels) > 2:
            first = [labels.index(label) for e in examples for label, _ in e["top"][:1]]
            classes = list(dict.fromkeys([*first, *range(len(labels))]))[:most]
            named = [labels[i] for i in sorted(classes)]
            last = list(self._network.shapes)[-1]
            parts.append(("The classes", last, sorted(classes), named))
        channels = list(range(self._network.shapes[self._layer][-1]))
        if len(stored):
            x = self._network.normalize(stored)
            found = self._network.taps(x, [self._layer])[self._layer]
            strength = found.reshape(-1, found.shape[-1]).mean(0)
            channels = np.argsort(-strength, kind="stable").tolist()
        channels = channels[: max(2, most // 2)]
        title = f"Channels of {self._layer}"
        if len(stored):
            title += " that answer most to these inputs"
        named = [f"channel {channel}" for channel in channels]
        parts.append((title, self._layer, channels, named))
        wishes = []
        for title, tap, channels, named in parts:
            with self.clock("optimized"):
                panels = sections.most_activating(
                    self._network,
                    tap,
                    channels,
                    named,
                    self._album,
                    f"optimized-{slug(tap)}",
                )
            wishes.append({"title": title, "panels": panels})
        return wishes


def slug(text: str) -> str:
    """Returns a name that any file system takes."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")[:40] or "unnamed"


def folder(place: int, name: str) -> str:
    """The folder of an input's drawings: its place and what its name says."""
    stem, _, row = re.split(r"[/\\]", name)[-1].partition("#")
    return f"{place:02d}-{slug(stem.rsplit('.', 1)[0] + '-' + row)}"
