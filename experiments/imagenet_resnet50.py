"""ImageNet with ResNet-50 (He et al. 2015; Goyal et al. 2017), for those who have it.

    launch/local.sh --config=experiments/imagenet_resnet50.py --config.data.dir=DIR

DIR holds imagenet2012 as TFDS prepares it, as ArrayRecord. The settings are those of
the papers, for eight accelerators or more. Not measured; a small generated copy of the
data runs in the tests.
"""

from convnet import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "imagenet2012"
    config.data.image_size = 224
    config.data.batch_size = 1024
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    config.data.placement = "stream"
    config.data.workers = 16
    config.augment.flip = "random"
    config.augment.resized_crop = (0.25, 1.0)
    config.model.name = "resnet50"
    config.model.dtype = "bfloat16"
    config.model.stem = "imagenet"
    config.task.label_smoothing = 0.1
    config.optimizer.name = "sgd"
    config.optimizer.lr = 0.4
    config.optimizer.weight_decay = 5e-5
    config.schedule.name = "cosine"
    config.schedule.warmup = 0.055
    config.train.epochs = 90.0
    config.checkpoint.every_steps = 1000
    return config
