"""spp-fx prune."""

from math import prod
from typing import Any

import click

from spp_fx.cli.base import (
    command,
    default_out,
    model_argument,
    model_folder,
    output_options,
    remote_code,
    split_targets,
    targets_option,
)
from spp_fx.console import Output


@command("prune")
@model_argument
@output_options("MODEL-PATTERN")
@click.option("--method", default="magnitude", show_default=True, help="Criterion that ranks weights.")
@click.option(
    "--pattern", default="2:4", show_default=True, help="N:M (N kept of every M inputs) or a share, 50%."
)
@targets_option
@remote_code
def prune_command(output: Output, model: str, **options: Any) -> None:
    """Make a dense MODEL folder sparse, tensor by tensor, and lock its masks.

    \b
    spp-fx prune my-model -o my-sparse --pattern 2:4
    spp-fx prune my-model --pattern 50% --targets up_proj,down_proj
    """
    from spp_fx.workflows.prune import prune

    folder = model_folder(model)
    pattern = options["pattern"]
    target = options["out"] or default_out(model, pattern.replace(":", "of").replace("%", "pct"))
    with output.bytes_bar("pruning") as tick:
        done = prune(
            folder,
            target,
            method=options["method"],
            pattern=pattern,
            targets=split_targets(options["targets"]),
            force=options["force"],
            trust_remote_code=options["trust_remote_code"],
            tick=tick,
        )

    def show() -> None:
        total = sum(prod(entry.shape) for entry in done.lock.sites)
        zeros = 1 - sum(entry.nnz for entry in done.lock.sites) / total
        click.echo(
            f"{done.out}: {len(done.lock.sites)} weights hold {done.pattern}, {zeros:.1%} of them zeros"
        )
        for name, reason in done.refused.items():
            click.echo(f"  left dense: {name}: {reason}")

    output.result(done.to_json(), show)
