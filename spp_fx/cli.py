"""The command line: parse, call a workflow, show the result."""

import functools
import logging
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from spp_fx.console import Output, megabytes, shape, table
from spp_fx.errors import SppFxError
from spp_fx.version import VERSION

FOLDER = click.Path(path_type=Path)
COMMAND: dict[str, Any] = {"context_settings": {"help_option_names": ["-h", "--help"]}}


class State:
    """Options of the whole command."""

    debug = False


@click.group(**COMMAND)
@click.version_option(VERSION, prog_name="spp-fx")
def cli() -> None:
    """Train pruned language models without moving a zero, fold, prove, export.

    \b
    spp-fx prune my-model -o my-sparse --method magnitude --pattern 2:4
    spp-fx inject my-sparse
    spp-fx train my-sparse-spp --data text.txt --steps 300
    spp-fx merge my-sparse-spp --verify-sparsity
    spp-fx verify my-sparse-spp-merged --pattern 2:4
    spp-fx export my-sparse-spp-merged --format cusparselt
    """


def main() -> None:
    """Entry point: runs the command and turns errors into one clear line and an exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run a command line; returns 0 if it holds, 1 if it does not or failed, 2 for wrong usage."""
    # A terminated run cleans its temporary folder up like an interrupted one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    debug = "--debug" in arguments
    try:
        code = cli.main(args=arguments, prog_name="spp-fx", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("spp-fx: interrupted; nothing is left half written", err=True)
        return 130
    except SppFxError as error:
        return _failed(str(error), error.exit_code, debug)
    except OSError as error:
        return _failed(str(error), 1, debug)
    except Exception as error:  # noqa: BLE001 - the last net: a bug is reported in one line, its trace with --debug
        return _failed(f"internal error: {type(error).__name__}: {error} (--debug shows where)", 1, debug)
    return code if isinstance(code, int) else 0


def _failed(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    click.echo(f"spp-fx: {message}", err=True)
    return code


def command(name: str) -> Callable[[Callable[..., Any]], click.Command]:
    """A subcommand with the options that every command has; it gets an `Output` as its first argument."""

    def decorate(function: Callable[..., Any]) -> click.Command:
        @cli.command(name, **COMMAND)
        @click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
        @click.option("-q", "--quiet", is_flag=True, help="No progress and no log on stderr.")
        @click.option("--debug", is_flag=True, help="Show the trace of an error.")
        @functools.wraps(function)
        def wrapped(as_json: bool, quiet: bool, debug: bool, **options: Any) -> Any:
            _calm(debug)
            return function(Output(as_json=as_json, quiet=quiet), **options)

        return wrapped

    return decorate


def _calm(debug: bool) -> None:
    """Other libraries' warnings and bars would drown ours."""
    if debug:
        return
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def model_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.argument("model", default=".")(function)


def remote_code(function: Callable[..., Any]) -> Callable[..., Any]:
    help_text = "Run code that the model folder brings. Off: such models are refused."
    return click.option("--trust-remote-code", is_flag=True, help=help_text)(function)


def output_options(default: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        function = click.option("--force", is_flag=True, help="Replace the output if it exists.")(function)
        return click.option("-o", "--out", type=FOLDER, help=f"Folder to write. Default: {default}.")(
            function
        )

    return add


def targets_option(function: Callable[..., Any]) -> Callable[..., Any]:
    help_text = (
        "Sites to take: last words of module names or globs, comma-separated or repeated "
        "(q_proj,v_proj or 'model.layers.0.*'). Default: every linear of the decoder layers."
    )
    return click.option("--targets", multiple=True, help=help_text)(function)


def _targets(values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(word for value in values for word in value.split(",") if word)


def _model(name: str) -> Path:
    from spp_fx.workflows.hub import resolve_model

    return resolve_model(name)


def beside(folder: Path, suffix: str) -> Path:
    """FOLDER-suffix beside a folder."""
    folder = folder.resolve()
    return folder.parent / f"{folder.name}-{suffix}"


@command("prune")
@model_argument
@output_options("MODEL-PATTERN")
@click.option("--method", default="magnitude", show_default=True, help="Criterion that ranks weights.")
@click.option(
    "--pattern", default="2:4", show_default=True, help="N:M (N kept of every M inputs) or a share, 50%."
)
@targets_option
@remote_code
def prune_command(output: Output, model: str, **options: Any) -> None:
    """Make a dense MODEL folder sparse, tensor by tensor, and lock its masks.

    \b
    spp-fx prune my-model -o my-sparse --pattern 2:4
    spp-fx prune my-model --pattern 50% --targets up_proj,down_proj
    """
    from spp_fx.workflows.prune import prune

    folder = _model(model)
    pattern = options["pattern"]
    target = options["out"] or beside(folder, pattern.replace(":", "of").replace("%", "pct"))
    with output.bytes_bar("pruning") as tick:
        done = prune(
            folder,
            target,
            method=options["method"],
            pattern=pattern,
            targets=_targets(options["targets"]),
            force=options["force"],
            trust_remote_code=options["trust_remote_code"],
            tick=tick,
        )

    def show() -> None:
        total = sum(_numel(entry.shape) for entry in done.lock.sites)
        zeros = 1 - sum(entry.nnz for entry in done.lock.sites) / total
        click.echo(
            f"{done.out}: {len(done.lock.sites)} weights hold {done.pattern}, {zeros:.1%} of them zeros"
        )
        for name, reason in done.refused.items():
            click.echo(f"  left dense: {name}: {reason}")

    output.result(done.to_json(), show)


@command("inject")
@model_argument
@output_options("MODEL-spp")
@click.option("--method", default="spp", show_default=True, help="Adapter method.")
@click.option(
    "--rank", default=16, show_default=True, help="Rank r; for spp a divisor of each site's outputs."
)
@click.option("--scale", default=2.0, show_default=True, help="The factor s of the update.")
@click.option(
    "--dropout", default=0.0, show_default=True, help="On the adapter branch's input while training."
)
@click.option("--seed", default=0, show_default=True, help="Of the factors' start.")
@click.option("--dry-run", is_flag=True, help="Only say what would be trained; config.json alone will do.")
@targets_option
@remote_code
def inject_command(output: Output, model: str, **options: Any) -> None:
    """Make an adapter folder for a pruned MODEL folder, with a lock of its masks.

    \b
    spp-fx inject my-sparse
    spp-fx inject my-sparse --rank 8 --targets q_proj,v_proj -o small-adapter
    spp-fx inject llama-7b --dry-run --json
    """
    from spp_fx.workflows.inject import inject

    folder = _model(model)
    method = options["method"]
    target = None if options["dry_run"] else options["out"] or beside(folder, method)
    with output.bytes_bar("looking at masks") as tick:
        done = inject(
            folder,
            target,
            method=method,
            rank=options["rank"],
            scale=options["scale"],
            dropout=options["dropout"],
            targets=_targets(options["targets"]),
            seed=options["seed"],
            force=options["force"],
            trust_remote_code=options["trust_remote_code"],
            tick=tick,
        )

    def show() -> None:
        if done.out is None:
            rows = [
                (
                    s["name"],
                    s["kind"],
                    shape(s["shape"]),
                    s["pattern"] or "-",
                    f"{s['trainable_parameters']:,}",
                )
                for s in done.to_json()["sites"]
            ]
            table("", ("site", "kind", "shape", "pattern", "trainable"), rows)
        where = "would train" if done.out is None else f"{done.out}:"
        click.echo(
            f"{where} {done.trainable:,} parameters over {len(done.sites)} weights, "
            f"{done.per_mille:.2f} per mille of {done.total:,}"
        )
        for name, reason in done.refused.items():
            click.echo(f"  not taken: {name}: {reason}")

    output.result(done.to_json(), show)


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
@click.option("--seed", default=0, show_default=True, help="Of data order and dropout.")
@click.option("--base", type=FOLDER, help="Base model, if it is not where the adapter says.")
@remote_code
def train_command(output: Output, adapter: Path, **options: Any) -> None:
    """Train an ADAPTER folder on a text file; zeros of the base never move.

    \b
    spp-fx train my-sparse-spp --data text.txt --eval-data held-out.txt --steps 300
    spp-fx train my-sparse-spp --data text.txt --epochs 3 --save-steps 100
    spp-fx train my-sparse-spp --data text.txt --epochs 3 --save-steps 100 --resume
    """
    from spp_fx.training.progress import ProgressCallback
    from spp_fx.workflows.train import TrainSettings, train

    names = ("steps", "epochs", "lr", "batch_size", "seq_len", "save_steps", "resume", "seed")
    with output.steps_bar("training") as bar:
        done = train(
            adapter,
            options["data"],
            TrainSettings(**{name: options[name] for name in names}),
            eval_data=options["eval_data"],
            teacher=_model(options["teacher"]) if options["teacher"] else None,
            base=options["base"],
            trust_remote_code=options["trust_remote_code"],
            callbacks=[ProgressCallback(bar.update)],
        )

    def show() -> None:
        click.echo(
            f"{done.adapter}: {done.steps} steps of {options['batch_size']} x {done.seq_len} tokens "
            f"in {done.seconds:.0f} s, learning rate {done.lr:.3g}, mean loss {done.loss:.3f}"
        )
        if done.before and done.after:
            click.echo(f"perplexity {done.before.perplexity:.2f} -> {done.after.perplexity:.2f}")

    output.result(done.to_json(), show)


@command("merge")
@click.argument("adapter", type=FOLDER, default=Path())
@output_options("ADAPTER-merged")
@click.option(
    "--verify-sparsity/--no-verify-sparsity",
    default=True,
    show_default=True,
    help="Read the output back from disk and hold every mask to the lock.",
)
@click.option("--base", type=FOLDER, help="Base model, if it is not where the adapter says.")
@click.option(
    "--vanish",
    type=click.Choice(["keep", "error", "allow"]),
    default="keep",
    show_default=True,
    help="A non-zero that folds to zero: keep the smallest normal number, fail, or allow the zero.",
)
def merge_command(output: Output, adapter: Path, **options: Any) -> None:
    """Fold an ADAPTER into its base model and prove that every mask is what it was.

    \b
    spp-fx merge my-sparse-spp --verify-sparsity
    cd my-sparse-spp && spp-fx merge --verify-sparsity -o ../merged
    """
    from spp_fx.workflows.merge import merge

    target = options["out"] or beside(adapter, "merged")
    with output.bytes_bar("folding") as tick:
        done = merge(
            adapter,
            target,
            base=options["base"],
            vanish=options["vanish"],
            verify_sparsity=options["verify_sparsity"],
            force=options["force"],
            tick=tick,
        )
    data = done.to_json()

    def show() -> None:
        summary = data["summary"]
        proof = f"{summary['masks_equal']} of {summary['sites']} masks equal to the lock, read back from disk"
        click.echo(f"{done.out}: {summary['sites']} weights folded, {summary['untouched']} copied")
        click.echo(f"  {proof if options['verify_sparsity'] else 'masks NOT verified'}")
        if summary["vanished"]:
            click.echo(f"  {summary['vanished']} values folded to zero (--vanish {options['vanish']})")

    output.result(data, show)


@command("verify")
@click.argument("artifact", type=FOLDER, default=Path())
@click.option("--pattern", help="Every site must hold it, such as 2:4.")
@click.option("--lock", type=FOLDER, help="Lock file. Default: sparsity.lock.json of the artifact.")
@click.option("--against", type=FOLDER, help="Another artifact whose masks must be the same.")
@click.option("--junit", type=FOLDER, help="Also write a JUnit report.")
@click.option("--github", is_flag=True, help="Also print GitHub annotations.")
def verify_command(output: Output, artifact: Path, **options: Any) -> int:
    """Hold an ARTIFACT to its lock, a pattern or another artifact; exit 1 if a site does not hold.

    ARTIFACT is a model, adapter or export folder, a .safetensors or an .onnx file.

    \b
    spp-fx verify my-model --pattern 2:4
    spp-fx verify my-model --lock sparsity.lock.json --junit report.xml
    spp-fx verify exported --against my-model --json
    """
    from spp_fx.report.github import annotations
    from spp_fx.report.junit import write_junit
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
        for site in verdict.sites:
            if not site.ok:
                click.echo(f"FAIL {site.name}: {site.reason}")
        summary = data["summary"]
        held = f"hold {verdict.pattern}" if verdict.pattern else "are as they should be"
        if verdict.ok:
            equal = sum(site.mask_equal is True for site in verdict.sites)
            masks = f", {equal} masks equal" if equal else ""
            click.echo(f"ok: {verdict.kind} {artifact}: all {summary['sites']} sites {held}{masks}")
        else:
            click.echo(
                f"not ok: {verdict.kind} {artifact}: {summary['failed']} of {summary['sites']} sites fail"
            )

    output.result(data, show)
    if options["github"]:
        for line in annotations(data):
            click.echo(line, err=output.as_json)
    return 0 if verdict.ok else 1


@command("export")
@model_argument
@output_options("MODEL-FORMAT")
@click.option("--format", "format_", required=True, type=click.Choice(["safetensors", "cusparselt", "onnx"]))
@click.option(
    "--sm", type=click.Choice(["80", "90"]), default="80", show_default=True, help="GPU of a cusparselt pack."
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16"]),
    help="Round a cusparselt export to this type; the library packs no float32.",
)
@click.option(
    "--indices",
    type=click.Choice(["smallest", "int64"]),
    default="smallest",
    show_default=True,
    help="Index type of onnx: the smallest onnxruntime takes, or the standard's own.",
)
@remote_code
def export_command(output: Output, model: str, **options: Any) -> None:
    """Write a sparse MODEL folder in the form a runtime takes; checked from disk before it says ok.

    \b
    spp-fx export my-merged --format cusparselt --sm 90 --dtype bfloat16
    spp-fx export my-merged --format onnx --indices int64
    spp-fx export my-merged --format safetensors
    """
    from spp_fx.workflows.export import ExportSettings, export

    folder = _model(model)
    target = options["out"] or beside(folder, options["format_"])
    with output.bytes_bar("exporting") as tick:
        done = export(
            folder,
            target,
            options["format_"],
            ExportSettings(sm=int(options["sm"]), dtype=options["dtype"], indices=options["indices"]),
            force=options["force"],
            trust_remote_code=options["trust_remote_code"],
            tick=tick,
            say=output.say,
        )
    data = done.to_json()

    def show() -> None:
        size = sum(file["bytes"] for file in data["files"])
        click.echo(f"{done.out}: {data['format']}, {len(data['sites'])} sparse weights, {megabytes(size)}")
        for key, value in data["sizes"].items():
            click.echo(f"  {key.replace('_', ' ')}: {megabytes(value)}")
        for key, value in data["checks"].items():
            click.echo(f"  {key.replace('_', ' ')}: {value}")
        for reason, names in done.reasons().items():
            click.echo(f"  {len(names)} weights ({names[0]}, ...): {reason}")

    output.result(data, show)


@command("inspect")
@model_argument
@remote_code
def inspect_command(output: Output, model: str, **options: Any) -> None:
    """Show the sites of a MODEL folder, their patterns, and which inject would take.

    \b
    spp-fx inspect my-sparse
    """
    from spp_fx.workflows.inspect import inspect

    with output.bytes_bar("looking at weights") as tick:
        done = inspect(_model(model), trust_remote_code=options["trust_remote_code"], tick=tick)

    def show() -> None:
        rows = [
            (
                view.site.name,
                view.site.kind,
                shape(view.site.shape),
                "-" if view.sparsity is None else f"{view.sparsity:.1%}",
                str(view.pattern or "-"),
                "yes" if view.matched else f"no: {view.reason}",
            )
            for view in done.sites
        ]
        table("", ("site", "kind", "shape", "zeros", "pattern", "matched"), rows, left=2)
        taken = sum(view.matched for view in done.sites)
        click.echo(f"{done.model_type}: {done.total:,} parameters, {len(done.sites)} sites, {taken} matched")

    output.result(done.to_json(), show)


@command("eval")
@model_argument
@click.option("--data", type=FOLDER, required=True, help="Text file.")
@click.option("--seq-len", type=int, help="Tokens per window. Default: 512, or what the model has.")
@click.option("--base", type=FOLDER, help="Base model of an adapter, if it is not where the adapter says.")
@remote_code
def eval_command(output: Output, model: str, **options: Any) -> None:
    """Perplexity of a text under a MODEL folder, or an adapter folder over its base.

    \b
    spp-fx eval my-merged --data held-out.txt
    """
    from spp_fx.workflows.evaluate import evaluate

    with output.steps_bar("evaluating") as bar:
        done_windows = 0

        def tick(what: str, count: int) -> None:
            nonlocal done_windows
            done_windows += count
            bar.update(done_windows, item=what)

        done = evaluate(
            _model(model),
            options["data"],
            seq_len=options["seq_len"],
            base=options["base"],
            trust_remote_code=options["trust_remote_code"],
            tick=tick,
        )

    def show() -> None:
        result = done.result
        click.echo(
            f"perplexity {result.perplexity:.2f} over {result.tokens:,} tokens "
            f"({result.windows} windows of {done.seq_len})"
        )

    output.result(done.to_json(), show)


@command("opt")
@model_argument
@click.option("-p", "--pipeline", required=True, help="canonicalize,match{targets=q_proj},inject{rank=8},...")
@click.option("--print-after-all", is_flag=True, help="Print the program after every pass.")
@remote_code
def opt_command(output: Output, model: str, **options: Any) -> None:
    """Run a PIPELINE of passes over a MODEL's program and say what each did, site by site.

    \b
    spp-fx opt my-sparse -p 'canonicalize,match,inject{rank=8},lower{kernel=fused}' --print-after-all
    """
    from spp_fx.workflows.optimize import optimize

    reports: list[dict[str, Any]] = []

    def after(spelling: str, report: Any, program: str) -> None:
        entry = {"pass": spelling, "changed": report.changed, "refused": report.refused}
        reports.append(entry | ({"program": program} if options["print_after_all"] else {}))
        if output.as_json:
            return
        click.echo(f"// {spelling}: {len(report.changed)} sites, {len(report.refused)} refused")
        for name, reason in report.refused.items():
            click.echo(f"//   {name}: {reason}")
        if options["print_after_all"]:
            click.echo(program)

    optimize(_model(model), options["pipeline"], after=after, trust_remote_code=options["trust_remote_code"])
    output.result({"passes": reports}, lambda: None)


@command("demo")
@click.option("-o", "--out", type=FOLDER, help="Leave everything there. Default: a temporary folder.")
def demo_command(output: Output, out: Path | None) -> None:
    """The whole way on a small model, offline: train it, prune, recover, merge, verify, export.

    \b
    spp-fx demo
    spp-fx demo -o demo-files
    """
    from spp_fx.workflows.demo import demo

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


def _numel(values: tuple[int, ...]) -> int:
    return functools.reduce(lambda a, b: a * b, values, 1)
