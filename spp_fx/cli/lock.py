"""spp-fx lock."""

from pathlib import Path
from typing import Any

import click

from spp_fx.cli.base import (
    FOLDER,
    command,
    model_argument,
    model_folder,
    remote_code,
    split_targets,
    targets_option,
)
from spp_fx.console import Output

_SHOWN = 5


@command("lock")
@model_argument
@click.option("-o", "--out", type=FOLDER, help="Lock file to write. Default: MODEL/sparsity.lock.json.")
@click.option("--force", is_flag=True, help="Replace the lock if it exists.")
@click.option("--pattern", help="What every site must hold, such as 2:4. Default: what each one holds.")
@targets_option
@remote_code
def lock_command(output: Output, model: str, **options: Any) -> None:
    """Write the lock of a sparse MODEL that has none: pattern and mask of every sparse weight.

    MODEL is a model folder, whoever pruned it, or a .safetensors file that stands alone. Without --pattern dense
    weights are left out, each with its reason; with it every weight that would be taken must hold it.

    \b
    spp-fx lock my-sparse --pattern 2:4
    spp-fx lock my-sparse -o locks/my-sparse.lock.json
    spp-fx lock my-sparse --force --json
    """
    from spp_fx.sparsity.lock import LOCK_NAME
    from spp_fx.verbs.lock import lock

    # A model of the hub lies in a cache, where nobody would look for its lock.
    target = options["out"] or (None if Path(model).exists() else Path(LOCK_NAME))
    with output.bytes_bar("locking") as tick:
        done = lock(
            model_folder(model),
            target,
            pattern=options["pattern"],
            targets=split_targets(options["targets"]),
            force=options["force"],
            trust_remote_code=options["trust_remote_code"],
            tick=tick,
            say=output.say,
        )

    def show() -> None:
        patterns = ", ".join(f"{count} of {pattern}" for pattern, count in done.patterns.items())
        click.echo(f"{done.out}: {len(done.lock.sites)} weights locked: {patterns}")
        for what, names in (done.replaced or {}).items():
            for name in names[:_SHOWN]:
                click.echo(f"  {what}: {name}")
            if len(names) > _SHOWN:
                click.echo(f"  {what}: {len(names) - _SHOWN} more; --json lists all")
        by_reason: dict[str, list[str]] = {}
        for name, reason in done.left_out.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            click.echo(f"  not locked: {names[0]}{more}: {reason}")

    output.result(done.to_json(), show)
