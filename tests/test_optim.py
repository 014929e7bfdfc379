"""Optimizers against their published updates in NumPy float64; schedules by hand.

Muon has a file of its own.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnet import optim

STEPS = 6
SHAPES = {
    "base/conv1/kernel": (3, 3, 2, 4),
    "base/conv1/bias": (4,),
    "base/conv2/kernel": (3, 3, 2, 4),
    "base/dense/kernel": (4, 8),
    "base/norm/scale": (4,),
    "head/kernel": (8, 3),
    "head/bias": (3,),
}
DECAYED = {name for name in SHAPES if name.endswith("kernel")}


def optimizer(name="sgd", **changes):
    keys = {"name": name, "lr": 0.05, "momentum": 0.9, "nesterov": True}
    keys |= {"beta2": 0.99, "weight_decay": 0.1, "clip_norm": 0.0}
    keys |= {"normalize": True, "newton_schulz": 5, "head_lr": 0.1, "bias_lr": 0.1}
    keys |= {"rest_momentum": 0.85, "whiten_until": 0.4}
    return types.SimpleNamespace(**keys | changes)


def schedule(name="constant", **changes):
    keys = {"name": name, "warmup": 0.0, "steps": (), "factor": 0.1, "final": 0.0}
    return types.SimpleNamespace(**keys | changes)


LINE = schedule("one_cycle", warmup=0.34, final=0.1)  # over 6 steps: up 2, down 4
LINE_LR = [0.05 * x for x in (1 / 3, 2 / 3, 1.0, 0.775, 0.55, 0.325)]


def nest(flat):
    tree = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jnp.asarray(leaf, jnp.float32)
    return tree


def flatten(tree):
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {
        "/".join(entry.key for entry in path): np.asarray(leaf) for path, leaf in paths
    }


@pytest.fixture(scope="module")
def start():
    rng = np.random.default_rng(0)
    params = {name: rng.normal(0, 0.5, shape) for name, shape in SHAPES.items()}
    params["head/bias"] = np.zeros(3)
    return params


@pytest.fixture(scope="module")
def gradients():
    """Growing from step to step: a clip norm in between acts on some of them only."""
    rng = np.random.default_rng(1)
    return [
        {name: (i + 1) * rng.normal(0, 0.1, shape) for name, shape in SHAPES.items()}
        for i in range(STEPS)
    ]


def train(chosen, start, gradients, plan=LINE):
    transformation, _ = optim.create(chosen, plan, STEPS)
    params = nest(start)
    state = transformation.init(params)

    @jax.jit
    def update(params, state, gradient):
        updates, state = transformation.update(gradient, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    for gradient in gradients:
        params, state = update(params, state, nest(gradient))
    return flatten(params)


def clipped(gradient, limit):
    norm = np.sqrt(sum((leaf**2).sum() for leaf in gradient.values()))
    return {name: leaf * min(1, limit / norm) for name, leaf in gradient.items()}


class Reference:
    """The published updates, leaf by leaf, float64."""

    def __init__(self, keys):
        self.keys, self.memory = keys, {}

    def decay(self, name, param):
        return self.keys.weight_decay * param if name in DECAYED else 0.0

    def momentum(self, name, gradient):
        mu, old = self.keys.momentum, self.memory.get(name)
        buffer = gradient if old is None else mu * old + gradient
        self.memory[name] = buffer
        return gradient + mu * buffer if self.keys.nesterov else buffer

    def adam(self, name, gradient, t, epsilon):
        b1, b2 = self.keys.momentum, self.keys.beta2
        m, v = self.memory.get(name, (0.0, 0.0))
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        self.memory[name] = m, v
        return (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + epsilon)

    def sgd(self, name, param, gradient, t):
        return self.momentum(name, gradient + self.decay(name, param))

    def adamw(self, name, param, gradient, t):
        return self.adam(name, gradient, t, 1e-8) + self.decay(name, param)

    def lamb(self, name, param, gradient, t):
        step = self.adam(name, gradient, t, 1e-6) + self.decay(name, param)
        if name not in DECAYED:
            return step
        return step * np.linalg.norm(param) / np.linalg.norm(step)

    def train(self, start, gradients, rates):
        params = dict(start)
        for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
            if self.keys.clip_norm:
                gradient = clipped(gradient, self.keys.clip_norm)
            rule = getattr(self, self.keys.name)
            params = {
                name: param - rate * rule(name, param, gradient[name], t)
                for name, param in params.items()
            }
        return params


@pytest.mark.parametrize(
    "chosen",
    [
        optimizer("sgd"),
        optimizer("sgd", nesterov=False, clip_norm=4.0),
        optimizer("adamw"),
        optimizer("adamw", weight_decay=0.0, clip_norm=4.0),
        optimizer("lamb", clip_norm=4.0),
    ],
    ids=lambda keys: f"{keys.name}-{keys.nesterov}-{keys.clip_norm}",
)
def test_update_is_the_published_one(chosen, start, gradients):
    norms = [np.sqrt(sum((g**2).sum() for g in tree.values())) for tree in gradients]
    assert min(norms) < 4.0 < max(norms)  # or else clipping is not tested
    ours = train(chosen, start, gradients)
    expected = Reference(chosen).train(start, gradients, LINE_LR)
    assert ours.keys() == expected.keys()
    for name in ours:
        moved = np.abs(expected[name] - start[name]).max()
        np.testing.assert_allclose(
            ours[name] - start[name],
            expected[name] - start[name],
            atol=2e-4 * moved,
            err_msg=name,
        )


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_compiled_update_has_no_loop(name, start):
    """A loop around heavy work is many times slower on a CPU."""
    transformation, _ = optim.create(optimizer(name), schedule("cosine"), STEPS)
    params = nest(start)
    state = transformation.init(params)
    text = str(jax.make_jaxpr(transformation.update)(params, state, params))
    assert "while[" not in text and "scan[" not in text


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_state_holds_all_that_depends_on_time(name, start, gradients):
    """Split in the middle, the state passed on as plain arrays: the same bits."""
    params = nest(start)
    whole, _ = optim.create(optimizer(name), LINE, STEPS)
    state = whole.init(params)
    trail = []
    for gradient in gradients[:4]:
        trail.append((params, state))
        updates, state = whole.update(nest(gradient), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    resumed_params, saved = jax.tree.map(np.asarray, trail[2])
    again, _ = optim.create(optimizer(name), LINE, STEPS)
    for gradient in gradients[2:4]:
        updates, saved = again.update(nest(gradient), saved, resumed_params)
        resumed_params = jax.tree.map(jnp.add, resumed_params, updates)
    jax.tree.map(np.testing.assert_array_equal, resumed_params, params)


def test_update_i_uses_the_rate_of_step_i():
    plain = optimizer(momentum=0.0, weight_decay=0.0, nesterov=False)
    transformation, rate = optim.create(plain, schedule("cosine", warmup=0.3), 10)
    params = {"bias": jnp.zeros(1)}
    state = transformation.init(params)
    for step in range(10):
        updates, state = transformation.update({"bias": jnp.ones(1)}, state, params)
        np.testing.assert_array_equal(updates["bias"], -np.ravel(rate(step)))


HALF = np.sqrt(0.5)


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (schedule(), {0: 1, 50: 1, 99: 1, 200: 1}),
        (schedule(warmup=0.1), {0: 1 / 11, 4: 5 / 11, 9: 10 / 11, 10: 1, 99: 1}),
        (schedule("cosine"), {0: 1, 25: (1 + HALF) / 2, 50: 0.5, 100: 0, 130: 0}),
        (
            schedule("cosine", warmup=0.2, final=0.1),
            {0: 1 / 21, 19: 20 / 21, 20: 1, 60: 0.55, 80: 0.55 - 0.45 * HALF, 100: 0.1},
        ),
        (schedule("linear"), {0: 1, 25: 0.75, 99: 0.01, 100: 0, 130: 0}),
        (
            schedule("linear", warmup=0.2, final=0.5),
            {0: 1 / 21, 19: 20 / 21, 20: 1, 60: 0.75, 100: 0.5, 130: 0.5},
        ),
        (
            schedule("one_cycle"),
            {0: 1 / 31, 29: 30 / 31, 30: 1, 65: 0.5, 99: 1 / 70, 100: 0, 130: 0},
        ),
        (
            schedule("one_cycle", warmup=0.5, final=0.2),
            {0: 1 / 51, 50: 1, 75: 0.6, 100: 0.2, 130: 0.2},
        ),
        (
            schedule("step", steps=(0.5, 0.75), factor=0.2),
            {0: 1, 49: 1, 50: 0.2, 74: 0.2, 75: 0.04, 99: 0.04},
        ),
        (
            schedule("step", warmup=0.1, steps=(0.3,)),
            {0: 1 / 11, 10: 1, 29: 1, 30: 0.1},
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_schedule_values(plan, expected):
    rate = optim.create_schedule(plan, 0.4, 100)
    jitted = jax.jit(rate)
    with jax.numpy_dtype_promotion("strict"):
        for step, share in expected.items():
            value = rate(step)
            assert value.dtype == jnp.float32 and value.shape == ()
            np.testing.assert_allclose(value, 0.4 * share, rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(jitted(step), value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", optim.SCHEDULES)
@pytest.mark.parametrize("total", [1, 2, 3])
def test_short_runs_never_take_an_empty_step(name, total):
    plan = schedule(name, warmup=0.9, steps=(0.5,))
    rate = optim.create_schedule(plan, 1.0, total)
    rates = np.array([rate(step) for step in range(total)])
    assert np.all(rates > 0) and np.all(rates <= 1)


def test_weight_decay_mask(start):
    mask = optim.weight_decay_mask(nest(start))
    named = flatten(mask)
    assert {name for name, decays in named.items() if decays} == DECAYED
    shapes = jax.eval_shape(lambda: nest(start))
    assert optim.weight_decay_mask(shapes) == mask


def test_ema_follows_its_recurrence():
    rng = np.random.default_rng(3)
    values = rng.normal(size=(40, 3)).astype(np.float32)
    decay, ema = 0.7, {"a": jnp.asarray(values[0])}
    expected = values[0].astype(np.float64)
    update = jax.jit(optim.ema_update, static_argnums=2)
    with jax.numpy_dtype_promotion("strict"):
        for step, value in enumerate(values[1:]):
            ema = update(ema, {"a": jnp.asarray(value)}, decay, step)
            # (1 + 20) / (10 + 20) is 0.7: the ramp ends at step 20.
            d = (1 + step) / (10 + step) if step < 20 else 0.7
            expected = d * expected + (1 - d) * value
            np.testing.assert_allclose(ema["a"], expected, rtol=1e-4, atol=1e-6)
    assert ema["a"].dtype == jnp.float32


def test_unknown_names_and_values_are_refused():
    with pytest.raises(ValueError, match=r"optimizer\.name.*'adam'.*sgd, adamw, lamb"):
        optim.create(optimizer("adam"), schedule(), 10)
    with pytest.raises(ValueError, match=r"schedule\.name.*'line'.*constant, cosine"):
        optim.create(optimizer(), schedule("line"), 10)
    with pytest.raises(ValueError, match=r"schedule\.warmup.*1\.5"):
        optim.create(optimizer(), schedule(warmup=1.5), 10)
    with pytest.raises(ValueError, match=r"schedule\.steps.*30"):
        optim.create(optimizer(), schedule("step", steps=(30, 60)), 100)
    with pytest.raises(ValueError, match="total_steps is 0"):
        optim.create(optimizer(), schedule(), 0)
