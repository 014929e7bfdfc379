"""Fast style transfer."""

from convnet import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "folder"
    config.data.image_size = 64
    config.data.batch_size = 8
    config.augment.flip = "random"
    config.model.name = "stylenet"
    config.model.width = 16
    config.task.name = "style"
    config.task.style_image = "docs/gallery/flower.jpg"
    config.task.features = "cifar10"
    config.optimizer.name = "adamw"
    config.optimizer.lr = 2e-3
    config.schedule.name = "one_cycle"
    config.train.epochs = 2.0
    return config
