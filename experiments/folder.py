"""Your own pictures: --config.data.dir=FOLDER, with a folder for each class.

HEADER
"""

from convnet import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "folder"
    config.data.image_size = 128
    config.data.batch_size = 64
    config.augment.flip = "random"
    config.augment.resized_crop = (0.4, 1.0)
    config.augment.brightness = 0.2
    config.augment.contrast = 0.2
    config.augment.saturation = 0.2
    config.model.name = "resnet18"
    config.model.width = 32
    config.model.stem = "imagenet"
    config.model.dropout = 0.2
    config.task.label_smoothing = 0.1
    config.optimizer.name = "adamw"
    config.optimizer.lr = 2e-3
    config.optimizer.weight_decay = 0.05
    config.optimizer.ema = 0.99
    config.schedule.name = "one_cycle"
    config.train.epochs = 60.0
    config.train.eval_every = 5.0
    return config
