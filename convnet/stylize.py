"""Neural style transfer: one picture's content in another one's style.

usage: python -m convnet.stylize --content=IMG --style=IMG --output=IMG [--model=M]
           [--size=256] [--steps=300] [--optimizer=lbfgs] [--start=content]
           [--content_weight=1] [--style_weight=10] [--tv_weight=10]
           [--content_layers=TAP,...] [--style_layers=TAP,...] [--preserve_colour]
           [--every=N] [--seed=0]

Gatys, Ecker and Bethge 2016. The picture is changed until its maps at the content's
layers are those of --content, and the Gram matrices of its maps at the style's layers
those of --style. Any model file of a network for RGB images will do; VGG-19, trained on
ImageNet, does it best. With --every=N, every Nth picture is kept in OUTPUT_frames, and
all of them in OUTPUT_frames.gif.

Exit status: 0 done; 1 failed; 2 usage; 130 or 143 interrupted, after the picture so far
was written.
"""

import time
from typing import TYPE_CHECKING

from absl import flags

from convnet import cli, mesh
from convnet.errors import ConvnetError, UsageError
from convnet.progress import Progress, Signals

if TYPE_CHECKING:  # these bring JAX up
    from convnet.bundle import Bundle
    from convnet.style.frames import Frames
    from convnet.style.minimize import Step
    from convnet.style.transfer import Transfer

VGG19 = "hf://timm/vgg19.tv_in1k"

# In the order in which they are shown.
_TERMS = ("content", "style", "tv")


def define(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines the flags of this app."""

    def text(name: str, default: str | None, help: str) -> None:
        flags.DEFINE_string(name, default, help, flag_values=values)

    def number(name: str, default: float, help: str) -> None:
        flags.DEFINE_float(name, default, help, lower_bound=0.0, flag_values=values)

    def whole(name: str, default: int, least: int, help: str) -> None:
        flags.DEFINE_integer(name, default, help, lower_bound=least, flag_values=values)

    def choice(name: str, default: str, known: list[str], help: str) -> None:
        flags.DEFINE_enum(name, default, known, help, flag_values=values)

    text(
        "model",
        VGG19,
        "a model file, a workdir, the name of a model that ships, or hf://OWNER/NAME",
    )
    text("content", None, "the picture that is kept in what it shows")
    text("style", None, "the picture whose style is taken")
    text("output", None, "the picture that is written: .png, .jpg or .webp")
    whole("size", 256, 32, "longer side of the output in pixels; above 1024 in tiles")
    whole(
        "steps",
        300,
        1,
        "evaluations of loss and gradient at the coarsest level, half as many at each"
        " finer one",
    )
    whole("levels", 0, 0, "sizes, each twice the last; 0: the coarsest from 256 up")
    choice("optimizer", "lbfgs", ["lbfgs", "adam"], "what minimises the loss")
    choice("start", "content", ["content", "noise", "style"], "the first picture")
    number("content_weight", 1.0, "what the content counts")
    number("style_weight", 10.0, "what the style counts")
    number("tv_weight", 10.0, "what differences between neighbours count: smoothness")
    flags.DEFINE_bool(
        "relative",
        True,
        "errors relative to the layers' own size, so that weights mean the same for"
        " every network; --norelative: plain mean squares",
        flag_values=values,
    )
    text("content_layers", "", "taps, with commas; by default chosen for the network")
    text("style_layers", "", "taps, with commas; by default chosen for the network")
    choice(
        "pool",
        "trained",
        ["trained", "max", "average"],
        "the network's pools, where it lets choose; average makes pictures smoother,"
        " but is not for networks with batch normalisation",
    )
    flags.DEFINE_bool(
        "preserve_colour",
        False,
        "keep the content's colours; --colour_method says how",
        flag_values=values,
    )
    choice(
        "colour_method",
        "luminance",
        ["luminance", "histogram"],
        "of --preserve_colour: transfer brightness alone, or give the style the"
        " content's colours first",
    )
    choice("dtype", "float32", ["float32", "bfloat16"], "what the network computes in")
    whole("every", 0, 0, "keep every Nth picture, and an animation; 0: none")
    choice("animation", "gif", ["gif", "webp"], "what the animation of --every is")
    whole("seed", 0, 0, "of the noise that --start=noise begins with")


def main(values: flags.FlagValues) -> None:
    """Makes the picture, and says what it does.

    Raises:
      UsageError: a flag is missing, or names what is not there.
      ConvnetError: a picture or the model cannot be read, or the output not written.
      Interrupted: by a signal, after the picture so far was written.
    """
    for name in ("content", "style", "output"):
        if not values[name].value:
            raise UsageError(f"--{name} is missing (--help shows the usage)")
    mesh.start("auto")
    # After `start`, because these bring JAX up.
    from convnet.style import features as features_lib
    from convnet.style import pictures, transfer
    from convnet.style.frames import Frames
    from convnet.style.objective import Weights

    output = pictures.check_output(values.output)
    content = pictures.read("content", values.content)
    style = pictures.read("style", values.style)
    pool = "" if values.pool == "trained" else values.pool
    features = features_lib.create(_model(values.model), pool, values.dtype)
    taps = features_lib.choose(features, values.content_layers, values.style_layers)
    features = features.only(*taps)
    weights = Weights(values.content_weight, values.style_weight, values.tv_weight)
    settings = transfer.Settings(
        taps=taps,
        weights=weights,
        relative=values.relative,
        optimizer=values.optimizer,
        start=values.start,
        colour=values.colour_method if values.preserve_colour else "style",
        seed=values.seed,
    )
    plan = transfer.levels(
        content.shape,
        values.size,
        values.steps,
        values.levels,
        max(features.strides().values()),
    )
    for level in plan:
        features.shapes(level.height, level.width)
    print(f"content: {', '.join(taps[0])}\nstyle: {', '.join(taps[1])}")
    for level in plan:
        tiles = " in tiles" if level.tiled else ""
        print(f"{level.width}x{level.height}{tiles}: {level.evaluations} steps")
    frames = Frames(output, values.animation) if values.every else None
    run = transfer.Transfer(features, content, style, settings, plan)
    total = sum(level.evaluations for level in plan)
    with Signals() as signals:
        step, seconds = _follow(run, frames, values.every, total, signals)
        pixels = run.pixels(step.picture)
        pictures.write(output, pixels)
    if frames:
        frames.finish(pixels)
        print(f"wrote {frames.animation} and {frames.folder}")
    if signals.received is not None:
        raise cli.Interrupted(
            signals.received,
            f"interrupted after {step.evaluations} of {total} steps; {output} holds the"
            " picture so far",
        )
    print(f"{_shown(step.terms)} after {step.evaluations} steps, {seconds:.1f} s")
    print(f"wrote {output} ({pixels.shape[1]}x{pixels.shape[0]})")


def _follow(
    run: "Transfer", frames: "Frames | None", every: int, total: int, signals: Signals
) -> "tuple[Step, float]":
    """Runs a transfer to its end, or to a signal; returns the last step and seconds."""
    progress, shown = Progress(0, total), 0
    began = time.monotonic()
    for step in run:
        if shown == 0:  # what is compiled is compiled
            began = time.monotonic()
            progress.line(f"start: {_shown(step.terms)}")
        progress.advance(step.evaluations - shown)
        shown = step.evaluations
        seconds = time.monotonic() - began
        left = seconds / max(shown - 1, 1) * (total - shown)
        progress.show(shown, _shown(step.terms), left)
        if frames and step.evaluations % every == 0:
            frames.add(step.evaluations, run.pixels(step.picture))
        if signals.received is not None:
            break
    progress.close()
    return step, seconds


def _shown(terms: dict[str, float]) -> str:
    parts = "  ".join(f"{name} {terms[name]:.4g}" for name in _TERMS)
    return f"loss {sum(terms.values()):.4g}  {parts}"


def _model(name: str) -> "Bundle":
    if not name.startswith("hf://"):
        from convnet import bundle

        return bundle.load(name)
    from convnet.weights import importing

    try:
        return importing.load(name).bundle
    except UsageError:
        raise
    except ConvnetError as error:
        raise ConvnetError(
            f"{error} (--model also takes a file that convnet.convert wrote, a workdir,"
            " or --model=cifar10, which ships)"
        ) from error


if __name__ == "__main__":
    cli.run(main, define, __doc__)
