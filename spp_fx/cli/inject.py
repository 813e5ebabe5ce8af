"""spp-fx inject."""

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
from spp_fx.console import Output, shape, table
from spp_fx.verify.verdict import grouped


@command("inject")
@model_argument
@output_options("MODEL-spp")
@click.option("--method", default="spp", show_default=True, help="Adapter method.")
@click.option(
    "--rank",
    default=16,
    show_default=True,
    help="Rank r; for spp a divisor of a site's outputs, or it is skipped.",
)
@click.option("--scale", default=2.0, show_default=True, help="The factor s of the update.")
@click.option(
    "--dropout", default=0.0, show_default=True, help="On the adapter branch's input while training."
)
@click.option("--seed", default=0, show_default=True, help="Of the factors' start.")
@click.option("--dry-run", is_flag=True, help="Only say what would be trained; config.json alone will do.")
@targets_option
@click.option("--skip", multiple=True, help="Sites that get no adapter, named as for --targets.")
@remote_code
def inject_command(output: Output, model: str, **options: Any) -> None:
    """Make an adapter folder for a pruned MODEL folder, with a lock of its masks.

    \b
    spp-fx inject my-sparse
    spp-fx inject my-sparse --rank 8 --targets q_proj,v_proj -o small-adapter
    spp-fx inject llama-7b --dry-run --json
    """
    from spp_fx.verbs.inject import inject

    folder = model_folder(model)
    method = options["method"]
    target = None if options["dry_run"] else options["out"] or default_out(model, method)
    with output.bytes_bar("looking at masks") as tick:
        done = inject(
            folder,
            target,
            method=method,
            rank=options["rank"],
            scale=options["scale"],
            dropout=options["dropout"],
            targets=split_targets(options["targets"]),
            skip=split_targets(options["skip"]),
            seed=options["seed"],
            force=options["force"],
            trust_remote_code=options["trust_remote_code"],
            tick=tick,
            say=output.say,
        )

    def show() -> None:
        if done.out is None:
            rows = [
                (
                    s["name"],
                    s["kind"],
                    shape(s["shape"]),
                    s["pattern"] or "-",
                    f"{s['trainable_parameters']:,}",
                )
                for s in done.to_json()["sites"]
            ]
            table("", ("site", "kind", "shape", "pattern", "trainable"), rows)
        where = "would train" if done.out is None else f"{done.out}:"
        click.echo(
            f"{where} {done.trainable:,} parameters over {len(done.sites)} weights, "
            f"{done.per_mille:.2f} per mille of {done.total:,}"
        )
        for line in grouped(done.refused):
            click.echo(f"  not taken: {line}")

    output.result(done.to_json(), show)
