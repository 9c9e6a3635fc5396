"""What the commands share: their options, messages and exit codes, and defaults from a file."""

import json
import tomllib
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from p2bw import __version__

app = typer.Typer(
    name="p2bw",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Compile a PyTorch model into a placed pipeline, and train it under PipeDream-2BW.",
)

Json = Annotated[bool, typer.Option("--json", help="Print only JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no tables.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Limit = Annotated[
    float | None,
    typer.Option(help="Seconds that the search may take; the best plan so far is kept.  [none]"),
]
Gap = Annotated[
    str, typer.Option(help="Stop when the plan is proven to be this near to the fastest; 0: exact.")
]
Artifact = Annotated[Path, typer.Argument(metavar="DIR", help="An artifact of compile.")]
ModelPath = Annotated[
    Path | None, typer.Option("--model", help="The model file, if it has moved.", metavar="FILE")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="An argument of the factory."),
]
Autocast = Annotated[
    str | None, typer.Option(help="bf16: forward and loss run under torch.autocast.")
]


def split_model(text: str) -> tuple[str, str]:
    """'model.py:small' -> ('model.py', 'small'); without a factory it is 'model'."""
    path, _, factory = text.partition(":")
    return path, factory or "model"


def parse_counts(option: str, text: str, like: str) -> list[int]:
    """'4, 8,8' -> [4, 8]; UsageError, with what it could be `like`."""
    from p2bw.contract.errors import UsageError

    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() and len(word) < 10 for word in words):
        raise UsageError(f"{option} {text}: give numbers with commas between them, like {like}")
    return list(dict.fromkeys(map(int, words)))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"p2bw {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    context.default_map = _defaults(Path("p2bw.toml"))


def _defaults(path: Path) -> dict[str, dict[str, Any]]:
    """Options from p2bw.toml: one table for each command, its keys the long options."""
    if not path.is_file():
        return {}
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        fail(f"{path} is not valid TOML: {error}", 6)
    group = typer.main.get_command(app)
    commands = getattr(group, "commands", {})
    defaults: dict[str, dict[str, Any]] = {}
    for name, table in tables.items():
        if name not in commands or not isinstance(table, dict):
            fail(f"{path}: {name!r} is no table of a command ({', '.join(commands)})", 6)
        options = {
            option.removeprefix("--"): parameter
            for parameter in commands[name].params
            for option in parameter.opts
        }
        unknown = [key for key in table if key not in options]
        if unknown:
            fail(f"{path}: [{name}] has no option {unknown[0]!r}", 6)
        defaults[name] = {
            # One value of an option that takes several need not stand in a list.
            options[key].name: [value]
            if options[key].multiple and not isinstance(value, list)
            else value
            for key, value in table.items()
        }
    return defaults


def fail(message: str, code: int) -> NoReturn:
    typer.echo(f"p2bw: {message}", err=True)
    raise SystemExit(code)


@contextmanager
def reporting(debug: bool) -> Iterator[None]:
    """One clear message and the right exit code, whatever goes wrong."""
    from p2bw.contract.errors import P2BWError

    try:
        yield
    except P2BWError as error:
        if debug:
            traceback.print_exc()
        fail(str(error), error.exit_code)
    except MemoryError:
        fail("out of memory", 8)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except Exception as error:
        if debug:
            raise
        fail(
            f"this is a bug of p2bw: {type(error).__name__}: {error}\n"
            "Run the command again with --debug and report what it prints.",
            1,
        )


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
