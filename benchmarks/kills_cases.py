"""The configurations of `benchmarks.kills`, as flags of `convnet.main`."""

from pathlib import Path

import numpy as np
from PIL import Image

_DIGITS = (
    "--config=experiments/digits.py",
    "--config.data.train_limit=512",
    "--config.data.test_limit=128",
    "--config.data.batch_size=64",
    "--config.train.steps=96",
    "--config.train.eval_every=2",
)
# Every option that draws at random or keeps a state of its own.
_CIFAR10 = (
    "--config=experiments/cifar10_cnn.py",
    "--config.data.train_limit=512",
    "--config.data.test_limit=128",
    "--config.data.batch_size=32",
    "--config.augment.crop_pad=4",
    "--config.augment.resized_crop=(0.5,1.0)",
    *(f"--config.augment.{name}=10.0" for name in ("rotate", "shear")),
    *(
        f"--config.augment.{name}=0.2"
        for name in ("zoom", "brightness", "contrast", "saturation", "erase")
    ),
    "--config.augment.mixup=0.2",
    "--config.augment.cutmix=1.0",
    "--config.augment.trivial=True",
    "--config.model.widths=(8,16)",
    "--config.model.norm=batch",
    "--config.model.dense=(64,)",
    "--config.model.dtype=bfloat16",
    "--config.task.label_smoothing=0.1",
    "--config.optimizer.name=muon",
    "--config.optimizer.clip_norm=1.0",
    "--config.optimizer.accumulate=2",
    "--config.optimizer.ema=0.9",
    "--config.train.steps=64",
    "--config.train.eval_every=1",
)
_FOLDER = (
    "--config=experiments/cats_vs_dogs.py",
    "--config.data.placement=stream",
    "--config.data.workers=2",
    "--config.data.image_size=48",
    "--config.data.batch_size=16",
    "--config.model.widths=(8,16)",
    "--config.train.steps=96",
    "--config.train.eval_every=2",
)
CASES = {"digits": _DIGITS, "cifar10": _CIFAR10, "folder": _FOLDER}
# Besides those of evaluations.
EVERY = ("--config.checkpoint.every_steps=10", "--config.train.log_every=1")


def write_pictures(folder: Path) -> None:
    """Two classes, told apart by their brightness."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 64), ("test", 24)):
        for name, brightness in (("day", 160), ("night", 80)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.normal(brightness, 40, (60 + i % 5, 64, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(folder / split / name / f"{i}.jpg")
