"""spp-fx prune."""

from math import prod
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
    split_targets,
    targets_option,
)
from spp_fx.cli.calibration import calibration_options, read_calibration
from spp_fx.console import Output, table
from spp_fx.verify.verdict import grouped


@command("prune")
@model_argument
@output_options("MODEL-PATTERN")
@fresh_option
@click.option(
    "--method", default="magnitude", show_default=True,
    help="magnitude; wanda, ria or sparsegpt, which look at a text (--calib).",
)  # fmt: skip
@click.option(
    "--pattern", default="2:4", show_default=True, help="N:M (N kept of every M inputs) or a share, 50%."
)
@calibration_options
@click.option("--repair", help="dsnot: swap pruned weights for kept ones until outputs keep their mean.")
@click.option(
    "--ratio", "ratios", multiple=True, metavar="NAME@PATTERN",
    help="Another pattern for some sites: down_proj@4:8, 'model.layers.0.*@30%'. The last that fits counts.",
)  # fmt: skip
@click.option("--skip", multiple=True, help="Sites that stay dense, named as for --targets.")
@targets_option
@click.option("--damp", type=float, help="sparsegpt: added to the Hessian, a share of its diagonal. [0.01]")
@click.option("--block-size", type=int, help="sparsegpt: columns between updates of all others. [128]")
@click.option(
    "--permute", is_flag=True, default=None,
    help="ria: reorder inputs over the groups of N:M where the weights before can absorb it.",
)  # fmt: skip
@click.option("--device", help="Where layers run. Default: cuda where there is one, else cpu.")
@remote_code
def prune_command(output: Output, model: str, **options: Any) -> None:
    """Make a dense MODEL folder sparse and lock its masks.

    Methods that look at a text walk the decoder layers one by one, with the weights of one in memory. A run
    that was stopped goes on at the layer where it was when the same command is given again.

    \b
    spp-fx prune my-model -o my-sparse --pattern 2:4
    spp-fx prune my-model -o my-sparse --method wanda --pattern 2:4 --calib text.txt
    spp-fx prune my-model --method sparsegpt --pattern 50% --calib text.txt --skip 'model.layers.0.*'
    spp-fx prune my-model --method wanda --repair dsnot --calib text.txt --ratio down_proj@4:8
    """
    from spp_fx.memory import return_large_blocks
    from spp_fx.verbs.prune import prune

    return_large_blocks()
    folder = model_folder(model)
    pattern = options["pattern"]
    target = options["out"] or default_out(model, pattern.replace(":", "of").replace("%", "pct"))
    calibration = read_calibration(options)
    with output.steps_bar("pruning") as bar:
        done = prune(
            folder,
            target,
            method=options["method"],
            pattern=pattern,
            calibration=calibration,
            repair=options["repair"],
            options={name: options[name] for name in ("damp", "block_size", "permute")},
            targets=split_targets(options["targets"]),
            ratios=options["ratios"],
            skip=split_targets(options["skip"]),
            device=options["device"],
            force=options["force"],
            fresh=options["fresh"],
            trust_remote_code=options["trust_remote_code"],
            tick=bar.update,
            say=output.say,
        )

    def show() -> None:
        content = done.to_json()
        if calibration is not None:
            rows = [
                (
                    site["name"],
                    site["pattern"],
                    f"{site['sparsity']:.2%}",
                    _share(site["error_before"]),
                    _share(site["error_after"]),
                )
                for site in content["sites"]
            ]
            table("", ("weight", "pattern", "zeros", "output error: mask alone", "in the end"), rows)
        total = sum(prod(entry["shape"]) for entry in content["sites"])
        zeros = 1 - sum(entry["nnz"] for entry in content["sites"]) / total
        patterns = ", ".join(dict.fromkeys(site["pattern"] for site in content["sites"]))
        click.echo(f"{done.out}: {len(content['sites'])} weights hold {patterns}, {zeros:.1%} of them zeros")
        notes: dict[str, list[str]] = {}
        for site in content["sites"]:
            for note in site["notes"]:
                notes.setdefault(note, []).append(site["name"])
        for note, names in notes.items():
            click.echo(f"  {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {note}")
        for line in grouped(done.refused):
            click.echo(f"  left dense: {line}")

    output.result(done.to_json(), show)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4%}"
