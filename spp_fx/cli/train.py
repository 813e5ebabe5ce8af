"""spp-fx train."""

from pathlib import Path
from typing import Any

import click
import yaml

from spp_fx.cli.base import FOLDER, command, model_folder, remote_code
from spp_fx.console import Output
from spp_fx.errors import UsageError

SETTINGS = (
    "steps", "epochs", "lr", "batch_size", "accumulate", "seq_len", "loss_on", "packing", "weight_decay", "schedule",
    "warmup", "clip", "bf16", "packed", "gradient_checkpointing", "shard", "save_steps", "eval_steps", "early_stop",
    "logging_steps", "resume", "force", "seed", "strict",
)  # fmt: skip


def read_options(context: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    """Options from a YAML file as defaults; what the command line says goes before them."""
    if path is None:
        return
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: cannot be read as YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: must hold options, one 'name: value' a line")
    known = {option.name for option in context.command.params} - {"config"}
    options = {str(name).replace("-", "_"): value for name, value in content.items()}
    if odd := sorted(options.keys() - known):
        raise UsageError(f"{path}: unknown option '{odd[0]}'; known: {', '.join(sorted(map(str, known)))}")
    context.default_map = {**(context.default_map or {}), **options}


@command("train")
@click.argument("adapter", type=FOLDER, default=Path())
@click.option(
    "--config", type=FOLDER, is_eager=True, expose_value=False, callback=read_options,
    help="YAML file with any of these options, 'seq-len: 512'; the command line goes before it.",
)  # fmt: skip
@click.option(
    "--data", required=True,
    help="Text file (lines '<|endoftext|>' part documents); .json or .jsonl with text, with instruction, input "
    "and output (or prompt and completion, question and answer), or with messages or conversations; or the name "
    "of a dataset on the hub.",
)  # fmt: skip
@click.option(
    "--eval-data",
    help="What the perplexity is measured of before and after, read as --data is; of instructions and chats the "
    "whole text counts, prompts too.",
)
@click.option(
    "--strict-data", "strict", is_flag=True,
    help="Refuse rows that hold nothing, such as an empty answer. Default: skip and count them.",
)  # fmt: skip
@click.option("--steps", type=int, help="Optimizer steps.")
@click.option("--epochs", type=float, help="Passes over the data. Default: 3, unless --steps is given.")
@click.option("--lr", type=float, help="Peak learning rate. Default: 4e-3 * sqrt(4096 / inputs).")
@click.option("--batch-size", default=16, show_default=True, help="Rows per forward and device.")
@click.option("--accumulate", default=1, show_default=True, help="Forwards per optimizer step.")
@click.option("--seq-len", type=int, help="Tokens per row at most. Default: 512, or what the model has.")
@click.option(
    "--loss-on", default="all", show_default=True, help="all, or answer: leave prompts out of the loss."
)
@click.option("--packing", is_flag=True, help="Put several short instructions or chats into one row.")
@click.option("--weight-decay", default=1e-3, show_default=True, help="Of AdamW.")
@click.option(
    "--schedule", default="linear", show_default=True, help="Of the learning rate: linear, cosine, ..."
)
@click.option("--warmup", default=0.03, show_default=True, help="Steps, or below 1 a share of all steps.")
@click.option("--clip", default=1.0, show_default=True, help="Largest norm of the gradient; 0: none.")
@click.option("--bf16", is_flag=True, help="Compute under bfloat16 autocast.")
@click.option(
    "--packed", is_flag=True, help="Keep the frozen weights packed: 0.56 of their memory at 2:4 in bf16."
)
@click.option("--gradient-checkpointing", is_flag=True, help="Less memory: layers run again in backward.")
@click.option(
    "--shard", help="Under torchrun: split the frozen weights over the world's processes, or a node's."
)
@click.option("--teacher", help="Model folder whose predictions are learned, such as the dense model.")
@click.option("--save-steps", type=int, help="Steps between checkpoints. Default: none.")
@click.option("--eval-steps", type=int, help="Steps between evaluations on --eval-data. Default: none.")
@click.option(
    "--early-stop", type=int, help="End after so many evaluations without a better one; keep the best."
)
@click.option("--logging-steps", default=10, show_default=True, help="Steps between reports of the loss.")
@click.option("--report-to", multiple=True, help="tensorboard, wandb, ... as transformers knows them.")
@click.option("--resume", is_flag=True, help="Go on from the newest whole checkpoint in ADAPTER.")
@click.option("--force", is_flag=True, help="Start anew, deleting the checkpoints of an earlier run.")
@click.option("--seed", default=0, show_default=True, help="Of data order and dropout.")
@click.option("--base", type=FOLDER, help="Base model, if it is not where the adapter says.")
@remote_code
def train_command(output: Output, adapter: Path, **options: Any) -> None:
    """Train an ADAPTER folder on text, instructions or chats; zeros of the base never move.

    Factors trained before are trained on. With --teacher the loss is the divergence from the teacher.

    \b
    spp-fx train my-sparse-spp --data text.txt --eval-data held-out.txt --steps 300
    spp-fx train my-sparse-spp --data alpaca.json --loss-on answer --packing --bf16 --epochs 3
    spp-fx train my-sparse-spp --config run.yaml --save-steps 100
    spp-fx train my-sparse-spp --config run.yaml --save-steps 100 --resume
    torchrun --nproc-per-node 8 -m spp_fx train my-sparse-spp --config run.yaml --shard world --packed
    """
    from spp_fx.training.distributed import leave
    from spp_fx.training.trainer import ProgressCallback
    from spp_fx.verbs.train import TrainSettings, train

    settings: dict[str, Any] = {name: options[name] for name in (*SETTINGS, "report_to")}
    with output.steps_bar("training") as bar:
        done = train(
            adapter,
            options["data"],
            TrainSettings(**settings),
            eval_data=options["eval_data"],
            teacher=model_folder(options["teacher"]) if options["teacher"] else None,
            base=options["base"],
            trust_remote_code=options["trust_remote_code"],
            callbacks=[ProgressCallback(bar.update)],
            say=output.say,
        )
    leave()

    def show() -> None:
        rows = options["batch_size"] * options["accumulate"] * done.processes
        click.echo(
            f"{done.adapter}: {done.steps} steps of {rows} x {done.seq_len} tokens in {done.seconds:.0f} s, "
            f"learning rate {done.lr:.3g}, loss {done.loss:.3f} on average, {done.losses[-1]:.3f} at the end"
        )
        if done.before and done.after:
            click.echo(f"perplexity {done.before.perplexity:.2f} -> {done.after.perplexity:.2f}")

    output.result(done.to_json(), show)
