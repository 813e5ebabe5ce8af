"""spp-fx export."""

from typing import Any

import click

from spp_fx.cli.base import command, default_out, model_argument, model_folder, output_options, remote_code
from spp_fx.console import Output, megabytes


@command("export")
@model_argument
@output_options("MODEL-FORMAT")
@click.option("--format", "format_", required=True, type=click.Choice(["safetensors", "cusparselt", "onnx"]))
@click.option(
    "--sm", type=click.Choice(["80", "90"]), default="80", show_default=True, help="GPU of a cusparselt pack."
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16"]),
    help="Round a cusparselt export to this type; the library packs no float32.",
)
@click.option(
    "--indices",
    type=click.Choice(["smallest", "int64"]),
    default="smallest",
    show_default=True,
    help="Index type of onnx: the smallest onnxruntime takes, or the standard's own.",
)
@remote_code
def export_command(output: Output, model: str, **options: Any) -> None:
    """Write a sparse MODEL folder in the form a runtime takes; checked from disk before it says ok.

    \b
    spp-fx export my-merged --format cusparselt --sm 90 --dtype bfloat16
    spp-fx export my-merged --format onnx --indices int64
    spp-fx export my-merged --format safetensors
    """
    from spp_fx.workflows.export import ExportSettings, export

    folder = model_folder(model)
    target = options["out"] or default_out(model, options["format_"])
    with output.bytes_bar("exporting") as tick:
        done = export(
            folder,
            target,
            options["format_"],
            ExportSettings(sm=int(options["sm"]), dtype=options["dtype"], indices=options["indices"]),
            force=options["force"],
            trust_remote_code=options["trust_remote_code"],
            tick=tick,
            say=output.say,
        )
    data = done.to_json()

    def show() -> None:
        size = sum(file["bytes"] for file in data["files"])
        click.echo(f"{done.out}: {data['format']}, {len(data['sites'])} sparse weights, {megabytes(size)}")
        for key, value in data["sizes"].items():
            click.echo(f"  size, {key.removesuffix('_bytes').replace('_', ' ')}: {megabytes(value)}")
        for key, value in data["checks"].items():
            shown = f"{value:.3g}" if isinstance(value, float) else value
            click.echo(f"  checked, {key.replace('_', ' ')}: {shown}")
        for reason, names in done.reasons().items():
            click.echo(f"  {len(names)} weights ({names[0]}, ...): {reason}")

    output.result(data, show)
