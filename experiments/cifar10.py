"""CIFAR-10, the flagship: a small ResNet with a one-cycle schedule.

HEADER
"""

from convnet import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "cifar10"
    config.data.batch_size = 128
    config.data.mean = (0.4914, 0.4822, 0.4465)
    config.data.std = (0.2470, 0.2435, 0.2616)
    config.augment.flip = "alternating"
    config.augment.crop_pad = 4
    config.model.name = "resnet9"
    config.model.width = 32
    config.task.label_smoothing = 0.1
    config.optimizer.name = "sgd"
    config.optimizer.lr = 0.2
    config.optimizer.weight_decay = 5e-4
    config.optimizer.ema = 0.99
    config.schedule.name = "one_cycle"
    config.schedule.warmup = 0.25
    config.train.epochs = 30.0
    return config
