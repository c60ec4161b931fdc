"""The command line, `vit-reciprocam`: a function per command.

Results go to stdout, all else to stderr.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Annotated

import typer

from vit_reciprocam.cli.benchmark import benchmark_command
from vit_reciprocam.cli.evaluate import evaluate_command, report_command
from vit_reciprocam.cli.explain import demo_command, explain_command
from vit_reciprocam.cli.models import models_command
from vit_reciprocam.cli.onnx import export_command, insert_command
from vit_reciprocam.cli.reproduce import reproduce_command

__all__ = ["app", "main"]

app = typer.Typer(
    name="vit-reciprocam",
    help="See what a Vision Transformer looks at, for the price of one forward pass.",
    no_args_is_help=True,
    rich_markup_mode=None,  # else long defaults are cut, in tables of Rich
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("explain")(explain_command)
app.command("demo")(demo_command)
app.command("evaluate")(evaluate_command)
app.command("benchmark")(benchmark_command)
app.command("report")(report_command)
app.command("reproduce")(reproduce_command)
app.command("export")(export_command)
app.command("insert")(insert_command)
app.command("models")(models_command)


def main() -> None:
    """Run the command line."""
    app()


@app.callback(invoke_without_command=True)
def _root(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the environment as one JSON document, with --version."),
    ] = False,
) -> None:
    if as_json and not show_version:
        raise typer.BadParameter(
            "before a command it goes with --version only, as in vit-reciprocam --version --json; "
            "to get a command's result as JSON put it after the command's name",
            param_hint="--json",
        )
    if show_version and as_json:
        from vit_reciprocam.cli.environment import report_environment

        typer.echo(json.dumps(report_environment(), indent=2))
        raise typer.Exit
    if show_version:
        typer.echo(f"vit-reciprocam {version('vit-reciprocam')}")
        raise typer.Exit
