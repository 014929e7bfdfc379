"""Is it a cat? A new head on the frozen base of the model that ships.

    python -m convnet.main --config=experiments/transfer_cat_vs_noncat.py \
        --config.data.dir=DIR

DIR holds train and test, each with cat and non-cat: 209 and 50 photographs of 64x64,
which are shrunk to the 32x32 that the model takes.
"""

from convnet import config as config_lib


def get_config():
    config = config_lib.default()
    config.init_from = "cifar10"
    config.data.name = "folder"
    config.data.batch_size = 64
    config.task.name = "binary"
    config.task.positive = "cat"
    config.augment.flip = "alternating"
    config.transfer.freeze = "base"
    config.optimizer.name = "lamb"
    config.optimizer.lr = 0.03
    config.optimizer.weight_decay = 0.1
    config.train.epochs = 300.0
    config.train.eval_every = 0.0
    config.evaluate.tta = "flip"
    return config
