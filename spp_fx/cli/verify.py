"""spp-fx verify."""

from pathlib import Path
from typing import Any

import click

from spp_fx.cli.base import FOLDER, command
from spp_fx.console import Output


@command("verify")
@click.argument("artifact", type=FOLDER, default=Path())
@click.option("--pattern", help="Every site must hold it, such as 2:4.")
@click.option("--lock", type=FOLDER, help="Lock file. Default: sparsity.lock.json of the artifact.")
@click.option("--against", type=FOLDER, help="Another artifact whose masks must be the same.")
@click.option("--junit", type=FOLDER, help="Also write a JUnit report.")
@click.option("--github", is_flag=True, help="Also print GitHub annotations.")
def verify_command(output: Output, artifact: Path, **options: Any) -> int:
    """Hold an ARTIFACT to its lock, a pattern or another artifact; exit 1 if it is not as it should be.

    ARTIFACT is a model, adapter or export folder, a .safetensors or an .onnx file.

    \b
    spp-fx verify my-model --pattern 2:4
    spp-fx verify my-model --lock sparsity.lock.json --junit report.xml
    spp-fx verify exported --against my-model --json
    """
    from spp_fx.report.github import annotations
    from spp_fx.report.junit import write_junit
    from spp_fx.report.text import printable
    from spp_fx.workflows.verify import verify

    with output.bytes_bar("verifying") as tick:
        verdict = verify(
            artifact,
            pattern=options["pattern"],
            lock=options["lock"],
            against=options["against"],
            tick=tick,
        )
    data = verdict.to_json()
    if options["junit"]:
        write_junit(data, artifact.resolve(), options["junit"])

    def show() -> None:
        for problem in verdict.problems:
            click.echo(f"FAIL {verdict.kind}: {printable(problem)}")
        for site in verdict.sites:
            if not site.ok:
                click.echo(f"FAIL {printable(site.name)}: {printable(site.reason or '')}")
        summary = data["summary"]
        held = f"hold {verdict.pattern}" if verdict.pattern else "are as they should be"
        if verdict.ok:
            equal = sum(site.mask_equal is True for site in verdict.sites)
            masks = f", {equal} masks equal" if equal else ""
            click.echo(f"ok: {verdict.kind} {artifact}: all {summary['sites']} sites {held}{masks}")
        else:
            why = f", {len(verdict.problems)} problems of the whole" if verdict.problems else ""
            failed = f"{summary['failed']} of {summary['sites']} sites fail"
            click.echo(f"not ok: {verdict.kind} {artifact}: {failed}{why}")

    output.result(data, show)
    if options["github"]:
        for line in annotations(data):
            click.echo(line, err=output.as_json)
    return 0 if verdict.ok else 1
