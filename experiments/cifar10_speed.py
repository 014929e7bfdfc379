"""CIFAR-10 in few steps: airbench94 with Muon, as a config of the one trainer.

    python -m convnet.main --config=experiments/cifar10_speed.py

2 CPU cores (an Intel Xeon with AMX), Python 3.13, the images as JPEG: 90.68 % of the
test images with six views of each (mean of seeds 0, 1, 2; standard deviation 0.19), in
7.6 to 10.7 minutes of training. A PyTorch implementation of the same recipe has 90.72 %
(0.34) on the same images, in 7.7 to 12.6 minutes. On AMD: 90.82 % (0.06; 89.67 % with
one view), 22 to 31 minutes in all. One H100: 90.69 % in 1.32 s of training (mean of
three seeds), 34 s with compilation in the first run; PyTorch 90.64 % in 1.59 s, and
197 s. One H200, one seed: 90.80 % in 1.16 s, PyTorch 90.68 % in 1.75 s.

Jordan 2024, arXiv:2404.00498, and github.com/KellerJordan/cifar10-airbench, whose
94.0 % in 2.59 s were measured on an A100 with the lossless images.
"""

from convnet import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "cifar10"
    config.data.batch_size = 2000
    config.data.mean = (0.4914, 0.4822, 0.4465)
    config.data.std = (0.2470, 0.2435, 0.2616)
    config.augment.flip = "alternating"
    config.augment.crop_pad = 2
    config.model.name = "speednet"
    config.model.dtype = "bfloat16"
    config.task.label_smoothing = 0.2
    config.optimizer.name = "muon"
    config.optimizer.lr = 0.24
    config.optimizer.momentum = 0.6
    config.optimizer.normalize = True
    config.optimizer.newton_schulz = 3
    # airbench sums its loss over the batch, ours is a mean: its rates times 2,000.
    config.optimizer.head_lr = 1340.0
    config.optimizer.bias_lr = 106.0
    config.optimizer.weight_decay = 0.004
    config.schedule.name = "linear"
    config.train.epochs = 8.0
    config.train.log_every = 5
    config.evaluate.tta = "flip_translate"
    return config
