"""Time series: 1-D convolutions on cylinder-bell-funnel (Saito 1994).

    python -m convnet.main --config=experiments/timeseries.py

2 CPU cores, Python 3.13: 99.8 % of 3,000 test series after 15 epochs, 4 s and 2 s of
compilation. The data are generated: 128 steps of noise with one of three shapes in it.
"""

from convnet import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "cylinder_bell_funnel"
    config.model.name = "cnn"
    config.model.widths = (16, 32, 64)
    config.model.depth = 1
    config.model.kernel = 7
    config.model.norm = "batch"
    config.model.gather = "global"
    config.optimizer.name = "adamw"
    config.optimizer.lr = 3e-3
    config.optimizer.weight_decay = 1e-3
    config.schedule.name = "one_cycle"
    config.train.epochs = 15.0
    config.train.eval_every = 5.0
    return config
