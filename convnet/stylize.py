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

       python -m convnet.stylize --model=M --content=PICTURE or FOLDER --output=FOLDER
           [--size=256] [--preserve_colour] [--dtype=bfloat16]

Johnson, Alahi and Fei-Fei 2016: M is a network that has learnt one style
(experiments/style_transfer.py) and paints each picture in a single pass.

Exit status: 0 done; 1 failed; 2 usage; 3 done, but some pictures of a folder could not
be read; 130 or 143 interrupted, after the picture so far was written.
"""

import sys
import time
from typing import TYPE_CHECKING

from absl import flags
from tqdm import tqdm

from convnet import cli, mesh
from convnet.errors import ConvnetError, UsageError
from convnet.predict_output import shown
from convnet.progress import Progress, Signals

if TYPE_CHECKING:  # these bring JAX up
    from convnet.bundle import Bundle
    from convnet.style.frames import Frames
    from convnet.style.minimize import Step
    from convnet.style.transfer import Transfer

_HUB = "hf://"
VGG19 = f"{_HUB}timm/vgg19.tv_in1k"

# What a style network has no use for.
_WEIGHED = ("steps", "levels", "optimizer", "start", "content_weight", "style_weight")
_WEIGHED += ("tv_weight", "relative", "content_layers", "style_layers", "pool")
_WEIGHED += ("colour_method", "every", "animation", "seed")
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
    text(
        "content",
        None,
        "the picture that is kept in what it shows; of a style network also a folder",
    )
    text("style", None, "the picture whose style is taken; a style network has its own")
    text(
        "output",
        None,
        "the picture that is written: .png, .jpg or .webp; of a style network a folder",
    )
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


def main(values: flags.FlagValues) -> int:
    """Makes the picture, and says what it does; returns the exit status, 0 or 3.

    Raises:
      UsageError: a flag is missing, or names what is not there.
      ConvnetError: a picture or the model cannot be read, or the output not written.
      Interrupted: by a signal, after the picture so far was written.
    """
    for name in ("content", "output"):
        if not values[name].value:
            raise UsageError(f"--{name} is missing (--help shows the usage)")
    if not values.style and values.model.startswith(_HUB):
        raise UsageError("--style is missing (--help shows the usage)")
    mesh.start("auto")
    if not values.style:
        return _paint(values)
    _transfer(values)
    return 0


def _paint(values: flags.FlagValues) -> int:
    """Sends pictures through a style network; returns the exit status, 0 or 3."""
    from convnet.data.decode import DecodeError
    from convnet.style import painting, pictures

    planned = painting.plan(values.content, values.output)
    bundle = _model(values.model)
    if bundle.task["name"] != "style":
        raise UsageError(
            f"--style is missing: --model={values.model} is no network that has learnt"
            " one"
        )
    for name in _WEIGHED:
        if values[name].present:
            raise UsageError(
                f"--{name} is for transfers that optimise a picture; the network of"
                f" --model={values.model} paints as it has learnt to"
            )
    painter = painting.Painter(
        bundle, values.size, values.preserve_colour, values.dtype
    )
    failed, began = 0, time.monotonic()
    for path, output, error in tqdm(planned, unit=" pictures", disable=None):
        try:
            if error:
                raise DecodeError(path, error)
            pixels = pictures.read("content", path)
        except DecodeError as decode_error:
            failed += 1
            tqdm.write(f"cannot read {shown(path)}: {decode_error.reason}", sys.stderr)
            continue
        painting.write(output, painter(pixels))
    done, seconds = len(planned) - failed, time.monotonic() - began
    print(f"painted {done:,} of {len(planned):,} pictures in {seconds:.1f} s")
    print(f"wrote {values.output}")
    return 3 if failed else 0


def _transfer(values: flags.FlagValues) -> None:
    """Optimises one picture."""
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
    if not name.startswith(_HUB):
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
