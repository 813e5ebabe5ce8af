"""spp-fx export."""

from dataclasses import fields
from typing import Any

import click

from spp_fx.cli.base import (
    command,
    default_out,
    fresh_option,
    model_argument,
    model_folder,
    output_options,
    remote_code,
)
from spp_fx.console import Output, megabytes


@command("export")
@model_argument
@output_options("MODEL-FORMAT")
@fresh_option
@click.option("--format", "format_", required=True, metavar="NAME", help="The form to write, see above.")
@click.option(
    "--sm",
    type=click.IntRange(min=70),
    default=80,
    show_default=True,
    help="GPU that weights are packed for: 80 Ampere, 90 Hopper; others are packed when they are loaded.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Round the weights to this type.",
)
@click.option("--with-past", is_flag=True, help="ONNX graph with a key/value cache, under Optimum's names.")
@click.option(
    "--indices",
    type=click.Choice(["smallest", "int64"]),
    default="smallest",
    show_default=True,
    help="Index type of onnx: the smallest onnxruntime takes, or the standard's own.",
)
@click.option(
    "--compare-logits/--no-compare-logits",
    default=None,
    help="Run the written graph and compare its logits with the model's. Default: models below 1 GB.",
)
@remote_code
def export_command(output: Output, model: str, **options: Any) -> None:
    """Write a sparse MODEL folder in the form a runtime takes; checked from disk before it says ok.

    \b
    cusparselt      2:4 packed for cuSPARSELt
    cutlass         2:4 packed for PyTorch's CUTLASS kernels
    onnx            ONNX, sparse initializers
    onnx-packed     ONNX, N:M weights packed, unpacked by standard operators
    onnx-dense      ONNX, dense constants that keep the pattern (TensorRT --sparsity=enable)
    safetensors     the plain folder that servers load
    sparse-bitmask  values and bitmasks: compact, any pattern, given back bit for bit by 'spp-fx unpack'

    \b
    spp-fx export my-merged --format cusparselt --sm 90 --dtype bfloat16
    spp-fx export my-merged --format onnx-packed --with-past
    spp-fx export my-merged --format safetensors
    """
    from spp_fx.verbs.export import ExportSettings, export

    folder = model_folder(model)
    target = options["out"] or default_out(model, options["format_"])
    with output.bytes_bar("exporting") as tick:
        done = export(
            folder,
            target,
            options["format_"],
            ExportSettings(**{field.name: options[field.name] for field in fields(ExportSettings)}),
            force=options["force"],
            fresh=options["fresh"],
            trust_remote_code=options["trust_remote_code"],
            tick=tick,
            say=output.say,
        )
    data = done.to_json()

    def show() -> None:
        size = sum(file["bytes"] for file in data["files"])
        click.echo(f"{done.out}: {data['format']}, {len(data['sites'])} sparse weights, {megabytes(size)}")
        dense, sites = (data["sizes"].get(f"{each}_bytes", 0) for each in ("dense", "sites"))
        if dense:
            click.echo(f"  they take {megabytes(sites)}, {sites / dense:.4g} of what they take dense")
        checks = {key.replace("_", " "): value for key, value in data["checks"].items()}
        counts = [f"{value} {key}" for key, value in checks.items() if isinstance(value, int) and value]
        click.echo(f"  checked: {', '.join(counts)}")
        for key, value in checks.items():
            if not isinstance(value, int):
                click.echo(f"  {key}: {f'{value:.3g}' if isinstance(value, float) else value}")
        for reason, names in done.reasons().items():
            click.echo(f"  {len(names)} weights ({names[0]}, ...): {reason}")

    output.result(data, show)
