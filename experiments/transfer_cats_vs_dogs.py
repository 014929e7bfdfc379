"""Cats against dogs, from the model that ships: all of it goes on learning.

    python -m convnet.main --config=experiments/transfer_cats_vs_dogs.py \
        --config.data.dir=DIR

DIR holds train and test, each with cats and dogs: 2,000 and 1,000 photographs of the
Asirra set. 2 CPU cores, Python 3.13: 93.6 % of the test images (95 % interval 91.9 to
95.0), 3.0 minutes. The same network, recipe and budget from scratch
(--config.init_from= --config.transfer.lr_scales= --config.model.name=speednet): 86.3 %
(84.0 to 88.3).
"""

from convnet import config as config_lib


def get_config():
    config = config_lib.default()
    config.init_from = "cifar10"
    config.data.name = "folder"
    config.data.image_size = 64
    config.data.batch_size = 64
    config.augment.flip = "random"
    config.augment.resized_crop = (0.4, 1.0)
    config.augment.brightness = 0.2
    config.augment.contrast = 0.2
    config.augment.saturation = 0.2
    config.model.dtype = "bfloat16"
    config.task.label_smoothing = 0.1
    config.transfer.lr_scales = "base=0.3"
    config.optimizer.name = "lamb"
    config.optimizer.lr = 0.03
    config.optimizer.weight_decay = 0.01
    config.optimizer.ema = 0.98
    config.schedule.name = "one_cycle"
    config.train.epochs = 8.0
    config.train.eval_every = 2.0
    config.evaluate.tta = "flip"
    return config
