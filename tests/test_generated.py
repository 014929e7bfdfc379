"""Generated datasets against their definitions, written out again one by one."""

import math
import random

import numpy as np
import pytest

from convnet.data import generated


@pytest.fixture(scope="module")
def series():
    return generated.load("cylinder_bell_funnel", 3, train=600, test=300)


@pytest.fixture(scope="module")
def weather():
    return generated.load("advection_diffusion", 3, train=40, test=20)


def saito(kind, rng):
    """One series by the definition, a step at a time, with Python's generator."""
    a = rng.randint(16, 32)
    b = a + rng.randint(32, 96)
    height = 6 + rng.gauss(0, 1)
    values = []
    for t in range(1, 129):
        inside = 1 if a <= t <= b else 0
        if kind == "bell":
            inside *= (t - a) / (b - a)
        elif kind == "funnel":
            inside *= (b - t) / (b - a)
        values.append(height * inside + rng.gauss(0, 1))
    return values


@pytest.mark.parametrize("kind", ["cylinder", "bell", "funnel"])
def test_series_have_the_moments_of_the_definition(kind):
    count = 1500
    found = generated.load("cylinder_bell_funnel", 1, train=3 * count, test=3)
    label = found.classes.index(kind)
    ours = found.train.inputs[found.train.labels == label][..., 0].astype(float)
    rng = random.Random(0)
    theirs = np.array([saito(kind, rng) for _ in range(count)])
    assert ours.shape == theirs.shape
    for moment in (1, 2):  # of each time step, then of the sums over the series
        for x, y in (
            (ours**moment, theirs**moment),
            (ours.sum(1, keepdims=True) ** moment, theirs.sum(1)[:, None] ** moment),
            (ours[:, 1:] * ours[:, :-1], theirs[:, 1:] * theirs[:, :-1]),
        ):
            error = np.sqrt((x.var(0) + y.var(0)) / count)
            assert (np.abs(x.mean(0) - y.mean(0)) < 5 * error).all()


def test_series_are_told_apart_by_their_neighbours(series):
    from sklearn.neighbors import KNeighborsClassifier

    train, test = series.train, series.test
    model = KNeighborsClassifier(1).fit(train.inputs[..., 0], train.labels)
    assert model.score(test.inputs[..., 0], test.labels) > 0.95


def test_series_are_balanced_float32(series):
    assert series.classes == ("cylinder", "bell", "funnel")
    for split, count in ((series.train, 600), (series.test, 300)):
        assert split.inputs.shape == (count, 128, 1)
        assert split.inputs.dtype == np.float32
        assert split.labels.dtype == np.int32
        assert np.bincount(split.labels).tolist() == [count // 3] * 3


@pytest.mark.parametrize("name", ["cylinder_bell_funnel", "advection_diffusion"])
def test_a_dataset_is_a_pure_function_of_its_seed(name):
    np.random.seed(0)
    first = generated.load(name, 5, train=6, test=6)
    np.random.seed(1)
    again = generated.load(name, 5, train=6, test=6)
    other = generated.load(name, 6, train=6, test=6)
    for split in ("train", "test"):
        ours, same = getattr(first, split), getattr(again, split)
        np.testing.assert_array_equal(ours.inputs, same.inputs)
        np.testing.assert_array_equal(ours.labels, same.labels)
        assert (ours.inputs != getattr(other, split).inputs).mean() > 0.9
    assert (first.train.inputs != first.test.inputs).mean() > 0.9
    correlation = np.corrcoef(first.train.inputs.ravel(), first.test.inputs.ravel())
    if name == "advection_diffusion":  # series of one class resemble each other
        assert abs(correlation[0, 1]) < 0.2


def test_a_test_split_does_not_depend_on_the_size_of_train():
    few = generated.load("cylinder_bell_funnel", 0, train=3, test=9)
    many = generated.load("cylinder_bell_funnel", 0, train=30, test=9)
    np.testing.assert_array_equal(few.test.inputs, many.test.inputs)


@pytest.mark.parametrize(("waves_lat", "waves_lon"), [(0, 3), (2, 0), (3, -5), (1, 1)])
@pytest.mark.parametrize(("zonal", "meridional"), [(1.7, 0.0), (0.3, -2.45), (9.1, 4)])
def test_one_fourier_mode_moves_and_decays_exactly(
    waves_lat, waves_lon, zonal, meridional
):
    """d/dt T + u dT/dx + v dT/dy = D lap T has one solution per mode."""
    lat, lon, diffusivity, steps = 12, 20, 0.3, 3
    y, x = np.meshgrid(np.arange(lat), np.arange(lon), indexing="ij")
    ky, kx = 2 * math.pi * waves_lat / lat, 2 * math.pi * waves_lon / lon
    maps = np.cos(ky * y + kx * x + 0.4)
    u, v = np.full(lat, zonal), np.full(lon, meridional)
    for _ in range(steps):
        maps = generated.advect_diffuse(maps, u, v, diffusivity)
    moved = ky * (y - meridional * steps) + kx * (x - zonal * steps)
    decay = math.exp(-diffusivity * (kx**2 + ky**2) * steps)
    np.testing.assert_allclose(maps, decay * np.cos(moved + 0.4), atol=1e-12)


def noise(*shape):
    """Maps without the highest wavenumber, which half a shift cannot represent."""
    spectrum = np.fft.rfft2(np.random.default_rng(0).standard_normal(shape))
    spectrum[..., shape[-2] // 2, :] = 0
    spectrum[..., shape[-1] // 2] = 0
    return np.fft.irfft2(spectrum, shape[-2:])


def test_whole_cells_are_a_roll_across_the_borders():
    maps = noise(3, 8, 16)
    u = np.arange(-4, 4)  # each row its own whole number of cells
    v = np.arange(-8, 8)
    want = np.stack([np.roll(maps[:, i], u[i], axis=-1) for i in range(8)], axis=1)
    want = np.stack([np.roll(want[..., j], v[j], axis=-1) for j in range(16)], axis=-1)
    found = generated.advect_diffuse(maps, u, v, 0.0)
    # Rolling rows apart makes columns hold the highest wavenumber: whole cells keep it.
    np.testing.assert_allclose(found, want, atol=1e-12)


def test_winds_keep_the_mean_and_diffusion_takes_the_variance():
    maps = noise(5, 16, 32)
    mean = maps.mean((1, 2))
    assert np.abs(mean).min() > 1e-4
    rng = np.random.default_rng(1)
    u, v = rng.normal(0, 3, (5, 16)), rng.normal(0, 3, (5, 32))
    before = maps
    for _ in range(6):
        after = generated.advect_diffuse(before, u, v, 0.1)
        np.testing.assert_allclose(after.mean((1, 2)), mean, atol=1e-12)
        assert (after.var((1, 2)) < before.var((1, 2))).all()
        before = after
    # Without diffusion, whole cells (where no wave lies between two) keep the variance.
    kept = generated.advect_diffuse(maps, np.rint(u), np.rint(v), 0.0)
    np.testing.assert_allclose(kept.var((1, 2)), maps.var((1, 2)), rtol=1e-12)


def test_a_shift_of_the_map_and_its_winds_shifts_the_result():
    """Periodicity: no row and no column is a border."""
    maps = noise(2, 16, 32)
    rng = np.random.default_rng(1)
    u, v = rng.normal(0, 2, (2, 16)), rng.normal(0, 2, (2, 32))
    plain = generated.advect_diffuse(maps, u, v, 0.1)
    turned = generated.advect_diffuse(
        np.roll(maps, (5, 11), (1, 2)), np.roll(u, 5, 1), np.roll(v, 11, 1), 0.1
    )
    np.testing.assert_allclose(turned, np.roll(plain, (5, 11), (1, 2)), atol=1e-12)


def test_weather_is_normalised_and_decays(weather):
    train, test = weather.train, weather.test
    assert weather.classes == ()
    assert train.inputs.shape == (40, 4, 32, 64, 1)
    assert test.labels.shape == (20, 32, 64, 1)
    assert {a.dtype for a in (train.inputs, train.labels, test.inputs)} == {
        np.dtype(np.float32)
    }
    assert train.inputs.astype(float).var() == pytest.approx(1, abs=1e-5)
    assert test.inputs.astype(float).var() == pytest.approx(1, abs=0.2)
    for split in (train, test):
        maps = np.concatenate([split.inputs, split.labels[:, None]], axis=1)
        np.testing.assert_allclose(maps.mean((2, 3, 4)), 0, atol=1e-6)
        assert (np.diff(maps.astype(float).var((2, 3, 4)), axis=1) < 0).all()


def neighbours(inputs, steps):
    """Each place's 3x3 neighbours in the last maps, as rows of a design matrix."""
    shifts = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    columns = [
        np.roll(inputs[:, -1 - step, ..., 0], shift, (1, 2)).ravel()
        for step in range(steps)
        for shift in shifts
    ]
    return np.stack(columns, axis=1)


def test_forecasts_far_better_than_persistence_exist(weather):
    from sklearn.linear_model import LinearRegression

    train, test = weather.train, weather.test
    errors = test.inputs[:, -1] - test.labels
    assert errors.shape == (20, 32, 64, 1)
    persistence = np.square(errors).mean()
    assert persistence > 0.3 * test.labels.var()
    ratios = []
    for steps in (1, 2):
        model = LinearRegression().fit(
            neighbours(train.inputs, steps), train.labels.ravel()
        )
        forecast = model.predict(neighbours(test.inputs, steps))
        error = np.square(forecast - test.labels.ravel()).mean()
        ratios.append(error / persistence)
    assert ratios[0] < 0.5
    assert ratios[1] < 0.7 * ratios[0]  # the past tells of the winds
