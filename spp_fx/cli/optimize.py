"""spp-fx opt."""

from typing import Any

import click

from spp_fx.cli.base import command, model_argument, model_folder, remote_code
from spp_fx.cli.calibration import calibration_options, read_calibration
from spp_fx.console import Output


@command("opt")
@model_argument
@click.option("-p", "--pipeline", required=True, help="canonicalize,match{targets=q_proj},inject{rank=8},...")
@click.option("--print-after-all", is_flag=True, help="Print the program after every pass.")
@calibration_options
@remote_code
def opt_command(output: Output, model: str, **options: Any) -> None:
    """Run a PIPELINE of passes over a MODEL's program and say what each did, site by site.

    \b
    spp-fx opt my-sparse -p 'canonicalize,match,inject{rank=8},lower{kernel=fused}' --print-after-all
    spp-fx opt my-model --calib text.txt -p 'canonicalize,match{dense=true},partition,prune{method=wanda}'
    """
    from spp_fx.verbs.opt import optimize

    reports: list[dict[str, Any]] = []

    def after(spelling: str, report: Any, program: str) -> None:
        entry = {"pass": spelling, "changed": report.changed, "refused": report.skipped}
        reports.append(entry | ({"program": program} if options["print_after_all"] else {}))
        if output.as_json:
            return
        click.echo(f"// {spelling}: {len(report.changed)} sites, {len(report.skipped)} refused")
        for name, reason in report.skipped.items():
            click.echo(f"//   {name}: {reason}")
        if options["print_after_all"]:
            click.echo(program)

    optimize(
        model_folder(model),
        options["pipeline"],
        after=after,
        calibration=read_calibration(options),
        trust_remote_code=options["trust_remote_code"],
        say=output.say,
    )
    output.result({"passes": reports}, lambda: None)
