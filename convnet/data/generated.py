"""Datasets that are computed, not read: pure functions of a seed, in NumPy.

A series for 1-D networks and maps in time for 3-D ones, with known answers and no
download.
"""

from collections.abc import Callable

import numpy as np

from convnet.data.source import ArraySource, Dataset


def load(name: str, seed: int, **sizes: int) -> Dataset:
    """Computes a dataset.

    Args:
      name: "cylinder_bell_funnel" or "advection_diffusion".
      seed: not negative; both splits follow from it, by independent streams.
      sizes: other sizes than the default: `train`, `test` (numbers of examples) and,
        for advection_diffusion, `lat` and `lon` (even).

    Returns:
      A dataset whose two sources hold arrays; the functions below give their shapes.
    """
    made: dict[str, Callable[..., Dataset]] = {
        "cylinder_bell_funnel": cylinder_bell_funnel,
        "advection_diffusion": advection_diffusion,
    }
    return made[name](seed, **sizes)


def cylinder_bell_funnel(seed: int, train: int = 3000, test: int = 3000) -> Dataset:
    """Noisy series that jump up and down, climb and drop, or jump up and descend.

    For t = 1 to 128, a from {16..32}, b - a from {32..96}, and eta, eps(t) standard
    normal, a series is (6 + eta) on [a, b] and 0 elsewhere, plus eps(t). In a bell the
    plateau is multiplied by (t - a) / (b - a), in a funnel by (b - t) / (b - a).

    N. Saito, "Local feature extraction and its applications using a library of bases",
    PhD thesis, Yale University, 1994.

    Returns:
      Inputs float32 (n, 128, 1), labels int32 (n,): classes in turn, so that every
      beginning of a split is balanced to one example.
    """
    streams = np.random.SeedSequence(seed).spawn(2)
    return Dataset(
        ArraySource(*_cylinder_bell_funnel(streams[0], train), "train"),
        ArraySource(*_cylinder_bell_funnel(streams[1], test), "test"),
        ("cylinder", "bell", "funnel"),
    )


def _cylinder_bell_funnel(
    stream: np.random.SeedSequence, count: int
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(stream)
    labels = np.arange(count, dtype=np.int32) % 3
    a = rng.integers(16, 32, (count, 1), endpoint=True)
    length = rng.integers(32, 96, (count, 1), endpoint=True)
    height = 6 + rng.standard_normal((count, 1))
    eps = rng.standard_normal((count, 128))
    climb = (np.arange(1, 129) - a) / length  # 0 at t = a, 1 at t = b
    shapes = np.stack([np.ones_like(climb), climb, 1 - climb])
    shape = shapes[labels, np.arange(count)]
    series = height * shape * ((climb >= 0) & (climb <= 1)) + eps
    return series[..., None].astype(np.float32), labels


# Of advection_diffusion. Lengths are in grid cells, times in steps between two maps.
_DRIFT = 1.5  # mean zonal velocity, as of the westerlies
_SPEED = 0.7  # standard deviation of the winds at a place, zonal and meridional alike
_WIND_WAVES = 2  # winds have the wavenumbers 1 to this
_FIELD_WAVELENGTH = 10.0  # of the waves at which the first map's amplitude drops
_DIFFUSIVITY = 0.05
_HISTORY = 4  # maps in an input
_AT_ONCE = 100  # sequences computed together: bounds the temporary memory


def advection_diffusion(
    seed: int, train: int = 2000, test: int = 400, lat: int = 32, lon: int = 64
) -> Dataset:
    """Weather in small: a scalar carried by winds it does not show, and diffusing.

    Each sequence has its own winds, steady, of two shears that take turns (see
    `advect_diffuse`) on top of a common eastward drift. The first map is smooth
    Gaussian noise. A network sees four maps and forecasts the fifth; to do better
    than the drift alone it must find each sequence's winds in the maps. All maps are
    divided by one number, which gives the training inputs variance 1; their mean is 0.

    Returns:
      Inputs float32 (n, 4, lat, lon, 1), the oldest map first; labels float32
      (n, lat, lon, 1), the next map. No classes. Both directions are periodic.
    """
    streams = np.random.SeedSequence(seed).spawn(2)
    maps = [
        _sequences(streams[0], train, lat, lon),
        _sequences(streams[1], test, lat, lon),
    ]
    # Over sequences, since the squares of all maps at once would double the memory.
    power = np.mean([np.mean(np.square(x), dtype=np.float64) for x in maps[0][0]])
    scale = np.float32(power**-0.5)
    for arrays in maps:
        for array in arrays:
            array *= scale
    return Dataset(ArraySource(*maps[0], "train"), ArraySource(*maps[1], "test"))


def advect_diffuse(
    maps: np.ndarray, zonal: np.ndarray, meridional: np.ndarray, diffusivity: float
) -> np.ndarray:
    """One step of advection and diffusion on a doubly periodic grid.

    Every row is shifted along lon by its zonal wind, then every column along lat by
    its meridional wind. Each shear carries the scalar without divergence and is exact
    on trigonometric polynomials, as is the diffusion between; hence any velocity is
    stable and the mean is kept. Alternating shears stir like the sine flow of
    R. T. Pierrehumbert, "Tracer microstructure in the large-eddy dominated regime",
    Chaos, Solitons & Fractals 4, 1994.

    Args:
      maps: real (..., lat, lon).
      zonal: (..., lat), cells a step, positive to greater lon.
      meridional: (..., lon), cells a step, positive to greater lat.
      diffusivity: squared cells a step, at least 0.

    Returns:
      The maps a step later, in the precision of `maps`.
    """
    maps = _shift(maps, zonal, diffusivity)
    return _shift(maps.swapaxes(-1, -2), meridional, diffusivity).swapaxes(-1, -2)


def _shift(maps: np.ndarray, distance: np.ndarray, diffusivity: float) -> np.ndarray:
    """Shifts rows (..., r, n) by distance (..., r) and diffuses them along n."""
    n = maps.shape[-1]
    wavenumber = 2 * np.pi * np.fft.rfftfreq(n)  # radians a cell
    change = np.exp(
        -1j * wavenumber * distance[..., None] - diffusivity * wavenumber**2
    )
    spectrum = np.fft.rfft(maps) * change
    return np.fft.irfft(spectrum, n).astype(maps.dtype, copy=False)


def _sequences(
    stream: np.random.SeedSequence, count: int, lat: int, lon: int
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(stream)
    inputs = np.empty((count, _HISTORY, lat, lon, 1), np.float32)
    labels = np.empty((count, lat, lon, 1), np.float32)
    for start in range(0, count, _AT_ONCE):
        part = slice(start, min(start + _AT_ONCE, count))
        size = part.stop - part.start
        zonal = _DRIFT + _winds(rng, size, lat)
        meridional = _winds(rng, size, lon)
        maps = _first_maps(rng, size, lat, lon)
        for step in range(_HISTORY):
            inputs[part, step, ..., 0] = maps
            maps = advect_diffuse(maps, zonal, meridional, _DIFFUSIVITY)
        labels[part, ..., 0] = maps
    return inputs, labels


def _winds(rng: np.random.Generator, count: int, n: int) -> np.ndarray:
    """Smooth periodic winds (count, n) of mean 0 and standard deviation _SPEED."""
    waves = np.arange(1, _WIND_WAVES + 1)
    angle = 2 * np.pi * waves[:, None] * np.arange(n) / n
    weights = rng.standard_normal((2, count, _WIND_WAVES)) * _SPEED / len(waves) ** 0.5
    return weights[0] @ np.cos(angle) + weights[1] @ np.sin(angle)


def _first_maps(rng: np.random.Generator, count: int, lat: int, lon: int) -> np.ndarray:
    """Smooth Gaussian noise, float32 (count, lat, lon), each of mean 0."""
    waves = np.hypot(np.fft.fftfreq(lat)[:, None], np.fft.rfftfreq(lon))
    amplitude = np.exp(-0.5 * (waves * _FIELD_WAVELENGTH) ** 2)
    amplitude[0, 0] = 0
    noise = rng.standard_normal((count, lat, lon), np.float32)
    return np.fft.irfft2(np.fft.rfft2(noise) * amplitude, (lat, lon)).astype(np.float32)
