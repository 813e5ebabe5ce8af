"""spp-fx unpack."""

from pathlib import Path
from typing import Any

import click

from spp_fx.cli.base import FOLDER, beside, command, output_options
from spp_fx.console import Output, megabytes


@command("unpack")
@click.argument("export", type=FOLDER, default=Path())
@output_options("EXPORT-unpacked")
def unpack_command(output: Output, export: Path, **options: Any) -> None:
    """Write the plain model folder that an EXPORT was made from; read back before it says ok.

    sparse-bitmask and safetensors give the weight files back byte for byte, packed formats one
    model.safetensors. A legacy compressed-tensors folder (sparse-24-bitmask) is made plain, too.

    \b
    spp-fx unpack my-merged-sparse-bitmask -o my-merged
    spp-fx unpack legacy-model -o plain-model
    """
    from spp_fx.verbs.unpack import unpack

    target = options["out"] or beside(export, "unpacked")
    with output.bytes_bar("unpacking") as tick:
        done = unpack(export, target, options["force"], tick=tick, say=output.say)
    data = done.to_json()

    def show() -> None:
        size = sum(file["bytes"] for file in data["files"])
        how = "weight files byte for byte as they were" if done.exact else "one model.safetensors"
        click.echo(f"{done.out}: unpacked from {done.format}, {megabytes(size)}, {how}")
        for key, value in done.checks.items():
            click.echo(f"  checked, {key.replace('_', ' ')}: {value}")

    output.result(data, show)
