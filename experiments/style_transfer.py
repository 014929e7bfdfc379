"""Fast style transfer: learn one picture's style once, then paint in a single pass.

    python -m convnet.main --config=experiments/style_transfer.py \
        --config.data.dir=DIR
    python -m convnet.stylize --model=runs/style_transfer --content=FOLDER \
        --output=painted

DIR is a folder with a folder of photographs for each class; the classes do not count.
"""

from convnet import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "folder"
    config.data.image_size = 64
    config.data.batch_size = 4
    config.data.test_limit = 64
    config.augment.flip = "random"
    config.model.name = "stylenet"
    config.model.width = 16
    config.task.name = "style"
    config.task.features = "cifar10"
    config.task.style_image = "docs/gallery/flower.jpg"
    config.task.style_size = 96
    config.task.style_weight = 3.0
    config.optimizer.name = "adamw"
    config.optimizer.lr = 2e-3
    config.schedule.name = "one_cycle"
    config.train.epochs = 1.0
    return config
