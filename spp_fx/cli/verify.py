"""spp-fx verify."""

import os
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spp_fx.cli.base import FOLDER, command, remote_code
from spp_fx.console import Output

if TYPE_CHECKING:
    from spp_fx.verify.policy import Check, Coverage
    from spp_fx.verify.verdict import Verified

_NAMES = "last word of a module's name or a glob; repeatable"


@command("verify")
@click.argument("artifact", type=FOLDER, required=False)
@click.option("--pattern", help="Every site must hold it, such as 2:4.")
@click.option("--lock", type=FOLDER, help="Lock file. Default: sparsity.lock.json of the artifact.")
@click.option("--against", type=FOLDER, help="Another artifact whose masks must be the same.")
@click.option("--require", multiple=True, metavar="NAME", help=f"Sites that must be sparse: {_NAMES}.")
@click.option("--allow-dense", multiple=True, metavar="NAME", help=f"Sites that need not be: {_NAMES}.")
@click.option(
    "--coverage",
    type=click.Choice(["lock", "all"]),
    help="all: every site of the model must be in the lock, or sparse where there is none; nothing is left unread.",
)
@click.option(
    "--policy", type=FOLDER, help="Policy file. Default: spp-fx.toml of the current folder, if any."
)
@click.option(
    "--jobs", type=click.IntRange(min=1), help="Sites looked at at once. Default: the CPUs, at most 8."
)
@click.option("--junit", type=FOLDER, help="Also write a JUnit report.")
@click.option("--sarif", type=FOLDER, help="Also write a SARIF 2.1.0 report.")
@click.option(
    "--github",
    is_flag=True,
    help="Also print GitHub annotations, and write the step's summary if there is one.",
)
@remote_code
def verify_command(
    output: Output,
    artifact: Path | None,
    pattern: str | None,
    lock: Path | None,
    against: Path | None,
    require: tuple[str, ...],
    allow_dense: tuple[str, ...],
    coverage: "Coverage | None",
    policy: Path | None,
    jobs: int | None,
    junit: Path | None,
    sarif: Path | None,
    github: bool,
    trust_remote_code: bool,
) -> int:
    """Hold an ARTIFACT to its lock, a pattern or another artifact; exit 1 if it is not as it should be.

    ARTIFACT is a model, adapter or export folder, a .safetensors or an .onnx file. Without one, all artifacts
    of the policy file are checked, or the current folder if there is no policy.

    \b
    Exit codes: 0 everything holds
                1 something does not hold, cannot be read, or a report could not be written
                2 the command or the policy is wrong; nothing was judged

    \b
    spp-fx verify my-model --pattern 2:4
    spp-fx verify my-model --lock sparsity.lock.json --coverage all --junit report.xml
    spp-fx verify exported --against my-model --json
    spp-fx verify --policy spp-fx.toml --github --sarif report.sarif
    """
    from spp_fx.verify.policy import Overrides, Policy

    given = Overrides(pattern, lock, against, coverage, require, allow_dense, trust_remote_code)
    rules = Policy.find(policy)
    if rules.path is not None:
        output.say(f"policy: {rules.path}")
    listed = artifact is None and rules.path is not None
    checks = rules.checks(given) if listed else [rules.check(artifact or Path(), given)]
    _check_reports(checks, rules.path, junit=junit, sarif=sarif)
    verdicts = _judge(output, checks, jobs)
    if click.get_current_context().params["debug"]:
        _trace(verdicts)
    _show(output, verdicts, listed=listed, github=github)
    _write_reports(verdicts, junit=junit, sarif=sarif, github=github)
    return 0 if all(verdict.ok for verdict in verdicts) else 1


def _check_reports(
    checks: "Sequence[Check]", policy: Path | None, *, junit: Path | None, sarif: Path | None
) -> None:
    from spp_fx.verify.report import check_targets

    options = (("--junit", junit, ".xml"), ("--sarif", sarif, ".sarif"))
    reports = {option: (path, suffix) for option, path, suffix in options if path is not None}
    artifacts = [path for check in checks for path in (check.path, check.against) if path is not None]
    locks = {f"lock of {check.path}": check.lock for check in checks if check.lock is not None}
    check_targets(reports, artifacts, locks | ({"policy": policy} if policy else {}))


def _judge(output: Output, checks: "Sequence[Check]", jobs: int | None) -> "list[Verified]":
    from spp_fx.memory import keep_freed_memory
    from spp_fx.verbs.verify import MASK_BYTES, run_check

    keep_freed_memory(MASK_BYTES)
    for check in checks:  # a wrong request must not throw away what was judged before it
        check.validate()
    verdicts: list[Verified] = []
    for check in checks:
        with output.bytes_bar(f"verifying {check.path}") as tick:
            verdicts.append(run_check(check, jobs=jobs, tick=tick))
    for note in dict.fromkeys(note for verdict in verdicts for note in verdict.notes):
        output.say(note)
    return verdicts


def _trace(verdicts: "Sequence[Verified]") -> None:
    for verdict in verdicts:
        if verdict.error is not None:
            traceback.print_exception(verdict.error)


def _show(output: Output, verdicts: "Sequence[Verified]", *, listed: bool, github: bool) -> None:
    """One artifact's verdict in the form of `to_json`; those of a policy as a list.

    In words, one that cannot be opened is told as every command tells a failure: one line on stderr.
    """
    from spp_fx.errors import escaped
    from spp_fx.verify.report import Root, annotations
    from spp_fx.verify.verdict import all_to_json, lines

    def show() -> None:
        for verdict in verdicts:
            if not listed and verdict.error is not None:
                click.echo("spp-fx: " + escaped(verdict.problems[0]), err=True)
                continue
            for line in lines(verdict, one_of_many=len(verdicts) > 1):
                click.echo(line)

    output.result(all_to_json(verdicts) if listed else verdicts[0].to_json(), show)
    if github:
        for line in annotations(verdicts, Root.current()):
            click.echo(line, err=output.as_json)


def _write_reports(
    verdicts: "Sequence[Verified]", *, junit: Path | None, sarif: Path | None, github: bool
) -> None:
    from spp_fx.verify import report as files
    from spp_fx.verify import report as junit_form
    from spp_fx.verify import report as sarif_form
    from spp_fx.verify import report as summary
    from spp_fx.verify.report import Root

    root = Root.current()
    step_summary = os.environ.get("GITHUB_STEP_SUMMARY") if github else None
    writes = []
    if junit:
        writes.append(lambda: files.write_report(junit, junit_form.junit(verdicts, root)))
    if sarif:
        writes.append(lambda: files.write_report(sarif, sarif_form.sarif(verdicts, root)))
    if step_summary:
        writes.append(lambda: files.append_report(Path(step_summary), summary.summary(verdicts, root)))
    files.write_all(writes)
