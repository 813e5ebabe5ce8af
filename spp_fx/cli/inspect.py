"""spp-fx inspect."""

from typing import Any

import click

from spp_fx.cli.base import command, model_argument, model_folder, remote_code
from spp_fx.console import Output, shape, table
from spp_fx.verify.verdict import grouped


@command("inspect")
@model_argument
@remote_code
def inspect_command(output: Output, model: str, **options: Any) -> None:
    """Show the sites of a MODEL folder, their patterns, and which inject would take.

    \b
    spp-fx inspect my-sparse
    """
    from spp_fx.verbs.inspect import inspect

    with output.bytes_bar("looking at weights") as tick:
        done = inspect(model_folder(model), trust_remote_code=options["trust_remote_code"], tick=tick)

    for note in done.notes:
        output.say(note)

    def show() -> None:
        rows = [
            (
                view.site.name,
                view.site.kind,
                shape(view.site.shape),
                "-" if view.sparsity is None else f"{view.sparsity:.1%}",
                str(view.pattern or "-"),
                "yes" if view.matched else f"no: {view.reason}",
            )
            for view in done.sites
        ]
        table("", ("site", "kind", "shape", "zeros", "pattern", "matched"), rows, left=2)
        for line in grouped(done.others):
            click.echo(f"  not a site: {line}")
        taken = sum(view.matched for view in done.sites)
        click.echo(f"{done.model_type}: {done.total:,} parameters, {len(done.sites)} sites, {taken} matched")

    output.result(done.to_json(), show)
