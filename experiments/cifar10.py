"""CIFAR-10, the flagship: a small ResNet with a one-cycle schedule.

    python -m convnet.main --config=experiments/cifar10.py --config.train.epochs=2

2 CPU cores, Python 3.13, the images as JPEG: 78.1 % of the test images (95 % interval
77.3 to 78.9) after 2 epochs, 7.3 minutes and 7 s of compilation, 230 images/s. The
number of epochs decides: the schedule spans whatever it is.

For a GPU the network is meant to be wider, --config.model.width=64
--config.model.dtype=bfloat16; that, and 30 epochs, have not been measured.
"""

from convnet import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "cifar10"
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
