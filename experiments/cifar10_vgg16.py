"""CIFAR-10 with VGG-16 and batch normalisation (Simonyan and Zisserman 2014).

    python -m convnet.main --config=experiments/cifar10_vgg16.py

2 CPU cores, Python 3.13, the images as JPEG, --config.train.steps=196 (half an epoch):
50.5 % of the test images after 5.9 minutes and 8 s of compilation, 70 images/s. The 40
epochs are meant for a GPU and have not been measured.
"""

from convnet import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "cifar10"
    config.augment.flip = "random"
    config.augment.crop_pad = 4
    config.model.name = "vgg16_bn"
    config.model.dense = (512,)
    config.model.dropout = 0.5
    config.task.label_smoothing = 0.1
    config.optimizer.name = "sgd"
    config.optimizer.lr = 0.05
    config.optimizer.weight_decay = 5e-4
    config.schedule.name = "one_cycle"
    config.train.epochs = 40.0
    return config
