"""Handwritten digits, 8x8, which come inside scikit-learn: no download.

    launch/local.sh --config=experiments/digits.py

2 CPU cores, Python 3.13: 360 of 360 test images right (95 % interval 98.9 to 100 %)
after 40 epochs, 9 s and 3 s of compilation.
"""

from convnet import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "digits"
    config.augment.translate = 0.1
    config.augment.rotate = 8.0
    config.augment.zoom = 0.1
    config.model.name = "cnn"
    config.model.widths = (32, 64)
    config.model.depth = 2
    config.model.norm = "batch"
    config.model.dense = (64,)
    config.model.dropout = 0.3
    config.optimizer.name = "adamw"
    config.optimizer.lr = 3e-3
    config.optimizer.weight_decay = 1e-2
    config.schedule.name = "one_cycle"
    config.train.epochs = 40.0
    config.train.eval_every = 5.0
    return config
