"""CIFAR-100: the flagship's network, wider, for a hundred classes.

    python -m convnet.main --config=experiments/cifar100.py

The first run downloads and prepares the data (169 MB). Not measured.
"""

from convnet import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "cifar100"
    config.augment.flip = "random"
    config.augment.crop_pad = 4
    config.augment.cutmix = 1.0
    config.model.name = "resnet9"
    config.model.width = 64
    config.task.label_smoothing = 0.1
    config.optimizer.name = "sgd"
    config.optimizer.lr = 0.2
    config.optimizer.weight_decay = 5e-4
    config.optimizer.ema = 0.999
    config.schedule.name = "one_cycle"
    config.train.epochs = 60.0
    return config
