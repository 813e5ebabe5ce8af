"""spp-fx demo."""

from pathlib import Path

import click

from spp_fx.cli.base import FOLDER, command
from spp_fx.console import Output, megabytes, table


@command("demo")
@click.option("-o", "--out", type=FOLDER, help="Leave everything there. Default: a temporary folder.")
def demo_command(output: Output, out: Path | None) -> None:
    """The whole way on a small model, offline: train it, prune, recover, merge, verify, export.

    \b
    spp-fx demo
    spp-fx demo -o demo-files
    """
    from spp_fx.verbs.demo import demo

    done = demo(out, output)

    def show() -> None:
        rows = [
            ("perplexity, dense", f"{done.dense:.2f}"),
            ("perplexity, pruned to 2:4", f"{done.pruned:.2f}"),
            ("perplexity, recovered and merged", f"{done.recovered:.2f}"),
            ("perplexity, ONNX file in onnxruntime", f"{done.onnx:.2f}"),
            ("recovered of what pruning lost", f"{done.share_recovered:.1%}"),
            ("masks equal", f"{done.masks_equal} of {done.sites}"),
            *((f"size, {name}", megabytes(size)) for name, size in done.sizes.items()),
        ]
        table("", ("", ""), rows)

    output.result(done.to_json(), show)
