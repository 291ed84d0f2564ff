"""Command line: `expertsteer-lens demo | capture | merge | label | fit | reproduce | show | steer |
evaluate | export | bench | benchmarks`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from expertsteer_lens.errors import ExpertSteerError

from . import commands_fit, commands_plan, commands_sets, commands_states
from .options import with_options
from .terminal import visible

EXIT_CODES = {
    0: "done",
    1: "an error, said in one line on standard error; or `reproduce` found another result",
    2: "options that are not understood, or numbers out of their range",
    130: "stopped by the user (Ctrl-C)",
    143: "asked to end (SIGTERM)",
}
"""With what a command ends. An error that is none of ours is a traceback and 1."""

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Steer a language model with directions taught by another model.",
    epilog="Exit codes: " + "; ".join(f"{code} {said}" for code, said in EXIT_CODES.items()) + ".",
)
for _command in (
    commands_fit.demo,
    commands_states.capture,
    commands_states.merge,
    commands_fit.label,
    commands_fit.fit,
    commands_fit.reproduce,
    commands_plan.show,
    commands_plan.steer,
    commands_plan.evaluate,
    commands_plan.export,
    commands_sets.bench,
    commands_sets.benchmarks,
):
    app.command()(with_options(_command))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; ends with one of `EXIT_CODES`. Our errors and files that cannot be read are one
    line without a traceback, and so is a package that is not installed."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that has no arrows gets question marks
            stream.reconfigure(errors="replace")
    try:
        app(None if arguments is None else list(arguments), prog_name="expertsteer-lens")
    except (ExpertSteerError, OSError) as error:
        said = " ".join([str(error), *getattr(error, "__notes__", ())])
        text = " ".join(said.split()) or type(error).__name__
        print(visible(f"{type(error).__name__}: {text}"), file=sys.stderr)
        raise SystemExit(1) from None
    except ImportError as error:
        if (error.name or "").split(".")[0] in ("", "expertsteer_lens"):
            raise  # not a package that is missing, but a fault of ours
        print(
            visible(f"ImportError: {error}; install what the command needs with pip."),
            file=sys.stderr,
        )
        raise SystemExit(1) from None


def _version(wanted: bool) -> None:
    if wanted:
        from expertsteer_lens import __version__

        typer.echo(f"expertsteer-lens {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print it and exit")
    ] = False,
) -> None:
    """Steer a language model with directions taught by another model."""


if __name__ == "__main__":
    main()
