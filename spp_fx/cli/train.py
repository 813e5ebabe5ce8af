"""spp-fx train."""

from pathlib import Path
from typing import Any

import click

from spp_fx.cli.base import FOLDER, command, model_folder, remote_code
from spp_fx.console import Output


@command("train")
@click.argument("adapter", type=FOLDER, default=Path())
@click.option("--data", type=FOLDER, required=True, help="Text file; lines '<|endoftext|>' part documents.")
@click.option("--eval-data", type=FOLDER, help="Text whose perplexity is measured before and after.")
@click.option("--steps", type=int, help="Optimizer steps.")
@click.option("--epochs", type=float, help="Passes over the data. Default: 3, unless --steps is given.")
@click.option("--lr", type=float, help="Peak learning rate. Default: 4e-3 * sqrt(4096 / inputs).")
@click.option("--batch-size", default=16, show_default=True, help="Windows per step and device.")
@click.option("--seq-len", type=int, help="Tokens per window. Default: 512, or what the model has.")
@click.option("--teacher", help="Model folder whose predictions are learned, such as the dense model.")
@click.option("--save-steps", type=int, help="Steps between checkpoints. Default: none.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in ADAPTER.")
@click.option("--force", is_flag=True, help="Start anew, deleting the checkpoints of an earlier run.")
@click.option("--seed", default=0, show_default=True, help="Of data order and dropout.")
@click.option("--base", type=FOLDER, help="Base model, if it is not where the adapter says.")
@remote_code
def train_command(output: Output, adapter: Path, **options: Any) -> None:
    """Train an ADAPTER folder on a text file; zeros of the base never move.

    Factors trained before are trained on. With --teacher the loss is the divergence from the teacher.

    \b
    spp-fx train my-sparse-spp --data text.txt --eval-data held-out.txt --steps 300
    spp-fx train my-sparse-spp --data text.txt --epochs 3 --save-steps 100
    spp-fx train my-sparse-spp --data text.txt --epochs 3 --save-steps 100 --resume
    """
    from spp_fx.training.progress import ProgressCallback
    from spp_fx.workflows.train import TrainSettings, train

    names = ("steps", "epochs", "lr", "batch_size", "seq_len", "save_steps", "resume", "force", "seed")
    with output.steps_bar("training") as bar:
        done = train(
            adapter,
            options["data"],
            TrainSettings(**{name: options[name] for name in names}),
            eval_data=options["eval_data"],
            teacher=model_folder(options["teacher"]) if options["teacher"] else None,
            base=options["base"],
            trust_remote_code=options["trust_remote_code"],
            callbacks=[ProgressCallback(bar.update)],
        )

    def show() -> None:
        click.echo(
            f"{done.adapter}: {done.steps} steps of {options['batch_size']} x {done.seq_len} tokens "
            f"in {done.seconds:.0f} s, learning rate {done.lr:.3g}, "
            f"loss {done.loss:.3f} on average, {done.last_loss:.3f} at the end"
        )
        if done.before and done.after:
            click.echo(f"perplexity {done.before.perplexity:.2f} -> {done.after.perplexity:.2f}")

    output.result(done.to_json(), show)
