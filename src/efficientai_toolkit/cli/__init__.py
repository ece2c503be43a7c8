"""The command line. A command is one file with one function, and one line in `COMMANDS`.

Only the command that is called is imported, so that `info` answers in a blink.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from ..errors import DivergenceError, ToolkitError
from .stdio import go_on_unread

PREFIX = "meta-learning-peft:"
# What MLX says in a RuntimeError where CPU, Metal or CUDA gives no memory.
_NO_MEMORY = re.compile(r"malloc\]|unable to allocate|out ?of ?memory", re.IGNORECASE)
# name → (module and function, group in --help)
COMMANDS: dict[str, tuple[str, str]] = {
    "info": ("info:info", "This machine"),
    "validate": ("validate:validate", "This machine"),
    "train": ("train:train", "Meta-learning"),
    "evaluate": ("evaluate:evaluate", "Meta-learning"),
    "adapt": ("adapt:adapt", "Your own task"),
    "predict": ("predict:predict", "Your own task"),
    "adapters": ("adapters_cmd:adapters", "Adapters"),
    "finetune": ("finetune:finetune", "Adapters"),
    "export": ("export:export", "Adapters"),
    "import": ("import_cmd:import_", "Adapters"),
    "fuse": ("fuse:fuse", "Adapters"),
    "compare": ("compare:compare", "Meta-learning"),
    "report": ("report:report", "Meta-learning"),
    "benchmark": ("benchmark:benchmark", "Meta-learning"),
    "reproduce": ("reproduce:reproduce", "Meta-learning"),
    "continual": ("continual:continual", "Continual learning"),
    "melpa": ("melpa:melpa", "Continual learning"),
}


class Commands(TyperGroup):
    """Loads a command when it is asked for; `train` is short for `meta-learning-peft:train`."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [PREFIX + name for name in COMMANDS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        name = cmd_name.removeprefix(PREFIX)
        if name not in COMMANDS:
            return None
        target, group = COMMANDS[name]
        module, _, attribute = target.partition(":")
        function = getattr(import_module(f".{module}", __name__), attribute)
        one = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        one.command(PREFIX + name, rich_help_panel=group)(_reported(function))
        return typer.main.get_command(one)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0].removeprefix(PREFIX)
        if name not in COMMANDS and not name.startswith("-"):
            import difflib

            close = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {PREFIX}{close[0]}?" if close else "`efficientai-toolkit --help` lists them"
            ctx.fail(f"no command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)


def _reported(function: Callable[..., None]) -> Callable[..., None]:
    """`function` with a user's mistake as one sentence and exit code 2, a divergence as 3, Ctrl-C as 130."""

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except ToolkitError as error:
            print(f"Error: {error}", file=sys.stderr)
            raise SystemExit(3 if isinstance(error, DivergenceError) else 2) from None
        except ImportError as error:
            if not _interrupted(error):
                raise
            _end_interrupted()
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _NO_MEMORY.search(str(error)):
                raise
            print(
                f"Error: out of memory ({str(error).rstrip('.') or 'no size is told'}); take fewer tasks or rows at "
                "once (meta_batch_size, query_size, --batch-size) or a smaller model",
                file=sys.stderr,
            )
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            _end_interrupted()

    return command


def _interrupted(error: BaseException | None) -> bool:
    """Whether it was Ctrl-C that `error` came of: within the import of an extension it becomes an ImportError."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _end_interrupted() -> NoReturn:
    print("Interrupted.", file=sys.stderr)
    raise SystemExit(130) from None


app = typer.Typer(
    cls=Commands,
    help="Meta-learning and parameter-efficient fine-tuning on MLX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _group() -> None:
    pass


def main() -> None:
    """The entry point `efficientai-toolkit`."""
    go_on_unread()
    command, *rest = [*sys.argv[1:], ""]
    # Typer reads options by way of pydantic, which takes longer to import than `info` takes to answer.
    if command.removeprefix(PREFIX) == "info" and rest in ([""], ["--json", ""]):
        from .info import info

        _reported(info)(json=len(rest) > 1)
    else:
        app()
