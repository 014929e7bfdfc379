"""Fast style transfer: learn one picture's style once, then paint in a single pass.

    python -m convnet.main --config=experiments/style_transfer.py \
        --config.data.dir=DIR
    python -m convnet.stylize --model=runs/style_transfer --content=FOLDER \
        --output=painted

DIR is a folder of photographs as for experiments/folder.py; the classes do not count.
With the 2,000 training photographs of cats and dogs of transfer_cats_vs_dogs.py, 2 CPU
cores (Intel Xeon), Python 3.13: a test loss of 2.16 (content 1.07, style 1.05) after
62 s and 10 s of compilation. Shapes stay legible, in the flower's dark green,
with its orange along bright edges. More task.style_weight is more flower: with 10 and
style_size 0 it covers all with petals.
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
