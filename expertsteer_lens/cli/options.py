"""Options that several commands share: each is described once here, and groups of them reach a
command as one object."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import typer
from typer.models import ArgumentInfo

from expertsteer_lens.errors import ArgumentError, ExpertSteerError, HostError

from .stopped import exit_code, terminated

SETTINGS = "Settings"
PUBLIC = "A public benchmark, in place of --pairs"
LOADING = "How models are loaded"
"""Groups in the help of what a first run does not need."""

Out = Annotated[Path, typer.Option("--out", help="folder for the results; made if missing")]
Seed = Annotated[
    int,
    typer.Option(min=0, max=2**32 - 1, help="of every random choice", rich_help_panel=SETTINGS),
]
NRandom = Annotated[
    int,
    typer.Option(
        "--n-random",
        min=2,
        help="random directions behind the floor",
        rich_help_panel=SETTINGS,
    ),
]
PlanName = Annotated[str, typer.Argument(metavar="PLAN", help="folder or hub id of a saved plan")]
TargetName = Annotated[str, typer.Option("--target", help="folder or hub id of the target")]
AsJson = Annotated[
    bool, typer.Option("--json", help="print one JSON object on standard output, and no tables")
]
BehaviourFile = Annotated[
    Path | None,
    typer.Option(
        "--behaviour",
        help="prompts with wanted and unwanted completions, to choose by and to test on: JSON with "
        "lists 'prompts', 'positive', 'negative'",
    ),
]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How models are loaded."""

    host: Annotated[
        str,
        typer.Option(
            "--host",
            help="transformer_lens, nnsight or huggingface (the fastest)",
            rich_help_panel=LOADING,
        ),
    ] = "transformer_lens"
    dtype: Annotated[
        str,
        typer.Option("--dtype", help="of the weights, e.g. bfloat16", rich_help_panel=LOADING),
    ] = "float32"
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            help="e.g. cuda:1; default: cuda where there is one",
            rich_help_panel=LOADING,
        ),
    ] = None
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="run model code that ships with the weights",
            rich_help_panel=LOADING,
        ),
    ] = False

    def check(self) -> None:
        """Refuse what no model can be loaded as, before anything is read.

        Raises:
            ArgumentError: an unknown host, a dtype that weights cannot have, or a device that is
                not there.
        """
        from expertsteer_lens._checks import check_choice
        from expertsteer_lens.hosts.loading import LOADABLE

        check_choice("host", self.host, LOADABLE)
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype) or dtype not in _WEIGHT_TYPES:
            raise ArgumentError(
                "dtype must name a torch dtype that weights can have ("
                f"{', '.join(str(d).removeprefix('torch.') for d in _WEIGHT_TYPES)}), got "
                f"{self.dtype!r}."
            )
        if self.device is not None:
            _check_device(self.device)

    def load(self, name: str) -> Any:
        """A model from a folder or the hub.

        Raises:
            ArgumentError: see `check`.
            HostError: there is no model that can be loaded.
        """
        from expertsteer_lens.hosts.loading import load_model

        self.check()
        try:
            return load_model(
                name,
                host=self.host,  # type: ignore[arg-type]  # checked above
                dtype=self.dtype,
                device=self.device,
                trust_remote_code=self.trust_remote_code,
            )
        except ExpertSteerError:
            raise
        except Exception as error:  # transformers raises many kinds; all mean the same to the user
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise HostError(
                f"{name} could not be loaded as a model with its tokenizer "
                f"({type(error).__name__}: {reason}); give the folder or hub id of a causal "
                "language model."
            ) from error


_WEIGHT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check_device(name: str) -> None:
    """Raise `ArgumentError` unless torch knows the device and it is there."""
    try:
        torch.empty(0, device=torch.device(name))
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise ArgumentError(
            f"--device {name!r} cannot be used ({reason}); give 'cpu', 'cuda' or e.g. 'cuda:1', or "
            "leave it out."
        ) from error


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Which labelled and unlabelled texts are read."""

    pairs: Annotated[
        Path | None,
        typer.Option(
            help="labelled texts: JSON lines with fields 'positive' and 'negative', texts or lists "
            "of messages"
        ),
    ] = None
    benchmark: Annotated[
        str | None,
        typer.Option(
            help="a name from the command `benchmarks`",
            rich_help_panel=PUBLIC,
        ),
    ] = None
    benchmark_path: Annotated[
        Path | None,
        typer.Option(help="its local file; default: the hub", rich_help_panel=PUBLIC),
    ] = None
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="most rows of the benchmark, drawn by the seed", rich_help_panel=PUBLIC
        ),
    ] = None
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="benchmark questions and answers as conversations, in each model's template",
            rich_help_panel=PUBLIC,
        ),
    ] = False
    anchors: Annotated[
        Path | None,
        typer.Option(
            help="unlabelled texts that both models read, one a line (.jsonl: texts or lists of "
            "messages; .json: a list of them)"
        ),
    ] = None


def parse_reading(value: str) -> Any:
    """What stands for a text when it is read: "answer", "mean", "last", "attention" or an index.

    Raises:
        ArgumentError: none of these.

    Example:
        >>> parse_reading("-2")
        -2
    """
    if value in ("answer", "mean", "last", "attention"):
        return value
    if not re.fullmatch(r"-?[0-9]{1,9}", value):
        raise ArgumentError(
            "--reading must be 'answer', 'mean', 'last', 'attention' or the index of a token such "
            f"as 0 or -2, got {value!r}."
        )
    return int(value)


def parse_shard(value: str | None) -> Any:
    """Which share of a capture: None, "auto", or (process, processes).

    Raises:
        ArgumentError: none of these.

    Example:
        >>> parse_shard("0/2")
        (0, 2)
    """
    if value is None or value == "auto":
        return value
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", value)
    if not found or not int(found[1]) < int(found[2]):
        raise ArgumentError(
            "--shard must be I/N, the process (from 0 on) and the number of processes, such as "
            f"0/2 and 1/2, or auto; got {value!r}."
        )
    return int(found[1]), int(found[2])


def _option_of(parameter: inspect.Parameter) -> str:
    """The option that a parameter stands for, as it is typed."""
    for part in getattr(parameter.annotation, "__metadata__", ()):
        if isinstance(part, ArgumentInfo):
            return parameter.name
        # The first name lies where typer looks for a default outside of Annotated.
        names = (getattr(part, "default", None), *(getattr(part, "param_decls", None) or ()))
        for name in names:
            if isinstance(name, str) and name.startswith("--"):
                return name
    return "--" + parameter.name.replace("_", "-")


def _check_names(given: Mapping[str, Any], options: Mapping[str, str]) -> None:
    """Raise `ArgumentError` for what no file, folder or model can be called, and for an option that
    took the next one for its path."""
    for name, value in given.items():
        if any("\0" in str(one) for one in (value if isinstance(value, list) else [value])):
            raise ArgumentError(f"{options[name]} holds a null byte; leave it out.")
        if isinstance(value, Path) and str(value).startswith("--"):
            raise ArgumentError(
                f"{options[name]} must be a path, got {str(value)!r}, which looks like an option: "
                f"give the path first. --help without {options[name]} explains the options; what "
                f"is really called so is ./{value}."
            )


def _named(message: str, options: Mapping[str, str]) -> str:
    """A message that begins with the name of an argument, with the option's name in its place.

    Example:
        >>> _named("n_draws must be at least 1", {"n_draws": "--n-draws"})
        '--n-draws must be at least 1'
    """
    name, space, rest = message.partition(" ")
    return options.get(name, name) + space + rest


def _reflowed(doc: str | None) -> str:
    r"""Paragraphs as one line each, since typer keeps the line ends of a docstring, which fit no
    terminal but ours.

    Example:
        >>> _reflowed("What it does.\n\n    How it goes\n    about it.")
        'What it does.\n\nHow it goes about it.'
    """
    paragraphs = inspect.cleandoc(doc or "").split("\n\n")
    return "\n\n".join(" ".join(part.split()) for part in paragraphs)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take groups of options as one object: typer sees the single options.

    A parameter whose annotation is a dataclass stands for its fields.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        group = hints[name]
        if not is_dataclass(group):
            parameters.append(
                parameter.replace(annotation=group, kind=inspect.Parameter.KEYWORD_ONLY)
            )
            continue
        groups[name] = group
        inner = get_type_hints(group, include_extras=True)
        for field in fields(group):
            assert field.default is not MISSING
            parameters.append(
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=field.default,
                    annotation=inner[field.name],
                )
            )

    options = {p.name: _option_of(p) for p in parameters}

    def run(**given: Any) -> None:
        _check_names(given, options)
        for name, group in groups.items():
            given[name] = group(**{f.name: given.pop(f.name) for f in fields(group)})
        try:
            with terminated():
                command(**given)
        except ArgumentError as error:
            renamed = ArgumentError(_named(str(error), options))
            for note in getattr(error, "__notes__", ()):
                renamed.add_note(note)
            raise renamed from error
        except KeyboardInterrupt as stop:
            # Here, since typer would end an interruption like an error, with exit code 1.
            typer.echo(str(stop).split(", which are kept")[0] or "stopped", err=True)
            raise typer.Exit(exit_code(stop)) from stop

    run.__name__, run.__module__ = command.__name__, command.__module__
    run.__doc__ = _reflowed(command.__doc__)
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run
