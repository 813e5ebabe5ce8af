"""What every subcommand shares: the group, the common options, and how names on the command line are read."""

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from spp_fx.console import Output
from spp_fx.version import VERSION

FOLDER = click.Path(path_type=Path)
COMMAND: dict[str, Any] = {"context_settings": {"help_option_names": ["-h", "--help"]}}


MODULES = {
    "prune": "prune",
    "inject": "inject",
    "train": "train",
    "merge": "merge",
    "verify": "verify",
    "export": "export",
    "unpack": "unpack",
    "lock": "lock",
    "inspect": "inspect",
    "eval": "evaluate",
    "opt": "optimize",
    "demo": "demo",
}
"""The subcommands, and the modules of this package that add them to the group as they are imported."""


class Verbs(click.Group):
    """Imports a subcommand when it is asked for: a check of one model waits for no other verb's libraries."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in MODULES:
            import_module(f"spp_fx.cli.{MODULES[cmd_name]}")
        return super().get_command(ctx, cmd_name)


@click.group(cls=Verbs, **COMMAND)
@click.version_option(VERSION, prog_name="spp-fx")
def cli() -> None:
    """Train pruned language models without moving a zero, fold, prove, export.

    \b
    spp-fx prune my-model -o my-sparse --method magnitude --pattern 2:4
    spp-fx inject my-sparse
    spp-fx train my-sparse-spp --data text.txt --steps 300
    spp-fx merge my-sparse-spp --verify-sparsity
    spp-fx verify my-sparse-spp-merged --pattern 2:4
    spp-fx export my-sparse-spp-merged --format cusparselt
    """


def command(name: str) -> Callable[[Callable[..., Any]], click.Command]:
    """A subcommand with the options that every command has; it gets an `Output` as its first argument."""

    def decorate(function: Callable[..., Any]) -> click.Command:
        @cli.command(name, short_help=(function.__doc__ or "").splitlines()[0], **COMMAND)
        @click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
        @click.option("-q", "--quiet", is_flag=True, help="No progress and no log on stderr.")
        @click.option("--debug", is_flag=True, help="Show the trace of an error.")
        @click.option(
            "--allow-links", is_flag=True, help="Follow symbolic links that leave a folder. Off: refused."
        )
        @functools.wraps(function)
        def wrapped(as_json: bool, quiet: bool, debug: bool, allow_links: bool, **options: Any) -> Any:
            from spp_fx.storage.links import links_allowed

            _calm(debug)
            with links_allowed(allow_links):
                return function(Output(as_json=as_json, quiet=quiet), **options)

        return wrapped

    return decorate


def _calm(debug: bool) -> None:
    """Other libraries' warnings and bars would drown ours."""
    if debug:
        return
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    # Read when these libraries are imported, which commands that need neither do not wait for.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules:  # called from a program that has it
        from transformers import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


def model_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.argument("model", default=".")(function)


def remote_code(function: Callable[..., Any]) -> Callable[..., Any]:
    help_text = "Run code that the model folder brings. Off: such models are refused."
    return click.option("--trust-remote-code", is_flag=True, help=help_text)(function)


def output_options(default: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        function = click.option("--force", is_flag=True, help="Replace the output if it exists.")(function)
        return click.option("-o", "--out", type=FOLDER, help=f"Folder to write. Default: {default}.")(
            function
        )

    return add


def fresh_option(function: Callable[..., Any]) -> Callable[..., Any]:
    help_text = "Begin anew, whatever an interrupted run on the same output left."
    return click.option("--fresh", is_flag=True, help=help_text)(function)


def targets_option(function: Callable[..., Any]) -> Callable[..., Any]:
    help_text = (
        "Sites to take: last words of module names or globs, comma-separated or repeated "
        "(q_proj,v_proj or 'model.layers.0.*'). Default: every linear of the decoder layers."
    )
    return click.option("--targets", multiple=True, help=help_text)(function)


def split_targets(values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(word for value in values for word in value.split(",") if word)


def model_folder(name: str) -> Path:
    from spp_fx.storage.folder import resolve_model

    return resolve_model(name)


def default_out(model: str, suffix: str) -> Path:
    """MODEL-suffix beside a model folder; in the current folder where MODEL is a hub id."""
    path = Path(model)
    return beside(path, suffix) if path.exists() else Path.cwd() / f"{path.name}-{suffix}"


def beside(folder: Path, suffix: str) -> Path:
    """FOLDER-suffix beside a folder."""
    folder = folder.resolve()
    return folder.parent / f"{folder.name}-{suffix}"
