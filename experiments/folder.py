"""Your own pictures: --config.data.dir=DIR, with a folder for each class.

    python -m convnet.main --config=experiments/folder.py --config.data.dir=DIR

A picture's class is the folder in which it lies; DIR may hold train and test or not.
On 2,000 training and 1,000 test photographs of cats and dogs, 2 CPU cores, Python 3.13,
--config.train.epochs=20: 77.4 % of the test images (95 % interval 74.7 to 79.9) after 7
minutes, 95 images/s on a busy machine. A few hundred pictures want many epochs.
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
