"""spp-fx merge."""

from pathlib import Path
from typing import Any

import click

from spp_fx.cli.base import FOLDER, beside, command, fresh_option, output_options
from spp_fx.console import Output


@command("merge")
@click.argument("adapter", type=FOLDER, default=Path())
@output_options("ADAPTER-merged")
@fresh_option
@click.option(
    "--verify-sparsity/--no-verify-sparsity",
    default=True,
    show_default=True,
    help="Read the output back from disk and hold every mask to the lock.",
)
@click.option("--base", type=FOLDER, help="Base model, if it is not where the adapter says.")
@click.option(
    "--vanish",
    type=click.Choice(["keep", "error", "allow"]),
    default="keep",
    show_default=True,
    help="A non-zero that folds to zero: keep the smallest normal number, fail, or allow the zero.",
)
def merge_command(output: Output, adapter: Path, **options: Any) -> None:
    """Fold an ADAPTER into its base model and prove that every mask is what it was.

    \b
    spp-fx merge my-sparse-spp --verify-sparsity
    cd my-sparse-spp && spp-fx merge --verify-sparsity -o ../merged
    """
    from spp_fx.verbs.merge import merge

    target = options["out"] or beside(adapter, "merged")
    with output.bytes_bar("folding") as tick:
        done = merge(
            adapter,
            target,
            base=options["base"],
            vanish=options["vanish"],
            verify_sparsity=options["verify_sparsity"],
            force=options["force"],
            fresh=options["fresh"],
            tick=tick,
            say=output.say,
        )
    data = done.to_json()

    def show() -> None:
        summary = data["summary"]
        proof = f"{summary['masks_equal']} of {summary['sites']} masks equal to the lock, read back from disk"
        click.echo(f"{done.out}: {summary['sites']} weights folded, {summary['untouched']} copied")
        click.echo(f"  {proof if options['verify_sparsity'] else 'masks NOT verified'}")
        if summary["vanished"]:
            click.echo(f"  {summary['vanished']} values folded to zero (--vanish {options['vanish']})")

    output.result(data, show)
