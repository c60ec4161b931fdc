"""The options that several commands share, and the functions that read their values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from vit_reciprocam.classifier.classifier import Classifier
from vit_reciprocam.classifier.load import is_onnx, load, specs
from vit_reciprocam.core.masks import KERNELS, LAYERS, SCORES
from vit_reciprocam.core.settings import read_value, split_pair
from vit_reciprocam.errors import InputError
from vit_reciprocam.methods import METHODS
from vit_reciprocam.onnx.run.sessions import BACKENDS
from vit_reciprocam.pictures.preprocess import PRESETS
from vit_reciprocam.pictures.render import COLORMAPS

DEFAULT_MODEL = "timm:deit_tiny_patch16_224"
DEFAULT_OUT = Path("vit-reciprocam-out")


def join_names(names: Iterable[str]) -> str:
    """Return the names as "a, b or c"."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def _join_with_default(names: Iterable[str]) -> str:
    """Return the names as "a (default), b or c"."""
    first, *others = names
    return join_names([f"{first} (default)", *others])


# --- the model ------------------------------------------------------------------------------------

_MODEL = f"Model: {join_names(specs())}"
Model = Annotated[str, typer.Option(metavar="SPEC", help=f"{_MODEL}.")]
Models = Annotated[
    list[str] | None, typer.Option(metavar="SPEC", help=f"{_MODEL}; may be given again.")
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="File of local weights, .safetensors or .pth, instead of the published ones; or "
        "random for untrained ones.",
    ),
]
WeightsOfEach = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="File of local weights instead of the published ones; given once for each --model, "
        "in the same order, or not at all.",
    ),
]
LibraryOptions = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE",
        help="Option for the library that builds the model, such as timm's img_size=1024; may be "
        "given again.",
    ),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help="Text that stands for one class, for models that compare pictures with texts: those "
        "of open_clip and some of hf; given once for each class.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="Device that computes: cpu, cuda, mps … for PyTorch models, an execution provider "
        "such as cuda for ONNX Runtime, a device such as GPU for OpenVINO."
    ),
]
ClassNames = Annotated[
    Path | None,
    typer.Option(help="Text file with one class name per line, instead of the model's own names."),
]

# --- ONNX files -----------------------------------------------------------------------------------

_BACKEND = f"Runtime of ONNX files: {_join_with_default(BACKENDS)}"
Backend = Annotated[str | None, typer.Option(metavar="NAME", help=f"{_BACKEND}.")]
Backends = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help=f"{_BACKEND}; may be given again.")
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, help="Number of CPU threads for ONNX files; default: the runtime's choice."
    ),
]
Preprocess = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[:KEY=VALUE,…]",
        help="Preprocessing of pictures for an ONNX file that does not name its own: "
        f"{join_names(PRESETS)}, and what differs from it, such as imagenet:size=224,crop_pct=0.9.",
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option(help="Name of the model, kept in the new file; default: the name of its source."),
]
FileTargets = Annotated[
    str,
    typer.Option(
        help="Classes that the file explains: all, top1, top3 …, or input, which adds an input "
        "named targets for their indices."
    ),
]
Raw = Annotated[
    bool, typer.Option("--raw", help="Write only probabilities, without maps scaled to [0, 1].")
]

# --- the method -----------------------------------------------------------------------------------

_METHOD = f"Method: {join_names(METHODS)}; settings follow its name, as in reciprocam:kernel=dirac"
Method = Annotated[str, typer.Option(metavar="NAME[:KEY=VALUE,…]", help=f"{_METHOD}.")]
Methods = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME[:KEY=VALUE,…]", help=f"{_METHOD}; may be given again."),
]
Kernel = Annotated[
    str | None,
    typer.Option(show_default=False, help=f"Kernel of the masks: {_join_with_default(KERNELS)}."),
]
ClassToken = Annotated[
    bool | None,
    typer.Option(
        "--class-token/--no-class-token",
        show_default=False,
        help="Keep the class token under every mask (default), or mask it too.",
    ),
]
Layer = Annotated[
    str | None,
    typer.Option(
        show_default=False,
        help=f"Layer whose output the masks multiply: {_join_with_default(LAYERS)}.",
    ),
]

Depth = Annotated[
    int | None,
    typer.Option(
        min=1,
        show_default=False,
        help="Number of blocks, the last ones, in which the class token sees masked patches; "
        "default: 1, the paper's method.",
    ),
]
Score = Annotated[
    str | None,
    typer.Option(
        show_default=False, help=f"Score of a class under a mask: {_join_with_default(SCORES)}."
    ),
]
Normalize = Annotated[
    str | None,
    typer.Option(
        show_default=False,
        help="Way from scores to maps: minmax (default), from the smallest to the largest, or "
        "evidence, from the score without any patch.",
    ),
]

# --- data and results -----------------------------------------------------------------------------

Limit = Annotated[
    int | None,
    typer.Option(min=1, help="Number of pictures to use, counted from the first; default: all."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Number of pictures in one call.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue a run that was cut short.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the results.")]
Colormap = Annotated[
    str, typer.Option(help=f"Colour map of the overlays: {join_names(COLORMAPS)}.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Debug = Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")]


def load_models(
    models: list[str] | None,
    weights: list[Path] | None,
    *,
    random: bool = False,
    device: str = "cpu",
    backends: list[str] | None = None,
    onnx: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[Classifier]:
    """Load the models, or the default one, with their weights; an ONNX file once per backend.

    `onnx` holds options of `load` that only ONNX files have, `options` those of all models.
    """
    names = models or [DEFAULT_MODEL]
    if weights and random:
        raise InputError("--random leaves weights untrained: drop it or --weights")
    if weights and len(weights) != len(names):
        raise InputError(
            f"{len(weights)} --weights for {len(names)} --model: give one for each, in the same "
            "order, or none for the published weights"
        )
    given = drop_none(onnx or {})
    if (given or backends) and not any(map(is_onnx, names)):
        wanted = ", ".join(f"--{name}" for name in [*given, *(["backend"] if backends else [])])
        raise InputError(f"{wanted}: for ONNX files, and no --model is one")
    classifiers = []
    for number, name in enumerate(names):
        file = weights[number] if weights else None
        variants: list[dict[str, Any]] = [{"weights": "random" if random else file}]
        if is_onnx(name):
            runtimes = backends or BACKENDS[:1]
            variants = [{"weights": file, "backend": one, **given} for one in runtimes]
        classifiers += [load(name, device=device, **variant, **options) for variant in variants]
    return classifiers


def drop_none(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are given; None stands for one that is not."""
    return {name: value for name, value in options.items() if value is not None}


def parse_options(pairs: list[str] | None) -> dict[str, Any]:
    """Return the settings that KEY=VALUE pairs give, values as `read_value` reads them."""
    options = {}
    for pair in pairs or []:
        key, value = split_pair(pair)
        if not key:
            raise InputError(f"--option must be KEY=VALUE, such as img_size=1024; got {pair!r}")
        options[key] = read_value(value)
    return options


def parse_size(text: str | None, option: str = "--size") -> tuple[int, int] | None:
    """Return the (height, width) that "HEIGHTxWIDTH" gives, or one number for both."""
    if text is None:
        return None
    sides = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if sides is None:
        raise InputError(f"{option} must be HEIGHTxWIDTH, such as 384x512; got {text!r}")
    return int(sides[1]), int(sides[2] or sides[1])


def read_lines(file: Path) -> list[str]:
    """Read the class names of a text file, one per line, each perhaps after a synset and a tab."""
    try:
        return [line.rpartition("\t")[2] for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--class-names {file} cannot be read: {error}") from error
