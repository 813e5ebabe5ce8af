"""spp-fx eval."""

from typing import Any

import click

from spp_fx.cli.base import FOLDER, command, model_argument, model_folder, remote_code
from spp_fx.console import Output


@command("eval")
@model_argument
@click.option(
    "--data", required=True,
    help="Text file, .json or .jsonl records (text, instructions, chats), or the name of a dataset on the hub.",
)  # fmt: skip
@click.option(
    "--strict-data", "strict", is_flag=True,
    help="Refuse rows that hold nothing, such as an empty answer. Default: skip and count them.",
)  # fmt: skip
@click.option("--seq-len", type=int, help="Tokens per window. Default: 512, or what the model has.")
@click.option("--base", type=FOLDER, help="Base model of an adapter, if it is not where the adapter says.")
@remote_code
def eval_command(output: Output, model: str, **options: Any) -> None:
    """Perplexity of a text under a MODEL folder, or an adapter folder over its base.

    Data is read as train reads it. Instructions and chats are measured as the whole text that the model would
    see, the prompt like the answer, as --loss-on all learns it.

    \b
    spp-fx eval my-merged --data held-out.txt
    spp-fx eval my-merged --data alpaca.json
    """
    from spp_fx.verbs.evaluate import evaluate

    with output.steps_bar("evaluating") as bar:
        done_windows = 0

        def tick(what: str, count: int) -> None:
            nonlocal done_windows
            done_windows += count
            bar.update(done_windows, item=what)

        done = evaluate(
            model_folder(model),
            options["data"],
            seq_len=options["seq_len"],
            base=options["base"],
            strict=options["strict"],
            trust_remote_code=options["trust_remote_code"],
            tick=tick,
            say=output.say,
        )

    def show() -> None:
        result = done.result
        click.echo(
            f"perplexity {result.perplexity:.2f} over {result.tokens:,} tokens "
            f"({result.windows} windows of {done.seq_len})"
        )

    output.result(done.to_json(), show)
