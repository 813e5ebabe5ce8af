"""Options of commands that look at a text before they change weights."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from spp_fx.verbs.load import Calibration


def calibration_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--seed", default=0, show_default=True, help="Of the draw of windows."),
        click.option("--seq-len", type=int, help="Tokens per window. Default: 2048, or what the model has."),
        click.option("--samples", default=128, show_default=True, help="Windows of the text to look at."),
        click.option(
            "--calib",
            help="Text to look at while pruning: a file, .jsonl records, or the name of a dataset on the hub.",
        ),
        click.option(
            "--strict-data",
            "strict",
            is_flag=True,
            help="Refuse rows of --calib that hold nothing, such as an empty answer. Default: skip and count them.",
        ),
    ):
        function = option(function)
    return function


def read_calibration(options: dict[str, Any]) -> "Calibration | None":
    """What the options say, or None where there is no text."""
    from spp_fx.verbs.load import Calibration

    if not options["calib"]:
        return None
    return Calibration(
        options["calib"], options["samples"], options["seq_len"], options["seed"], options["strict"]
    )
