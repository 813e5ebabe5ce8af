"""The command line: options come from the settings of the verbs, the work is done by the verbs."""

import gc
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spp_fx.command import (
    CONFIG,
    FRESH,
    HELP,
    RECIPE,
    REMOTE_CODE,
    beside,
    command,
    criteria,
    default_out,
    force_option,
    formats,
    methods,
    model_folder,
    out_option,
    reconstructions,
)  # fmt: skip
from spp_fx.console import Output
from spp_fx.errors import SppFxError, escaped, notes_of
from spp_fx.verbs.settings import (
    TASK,
    Calibration,
    EvaluateSettings,
    InjectSettings,
    LockSettings,
    MergeSettings,
    OptimizeSettings,
    PruneSettings,
    ReconstructSettings,
    TeachSettings,
    TrainData,
    TrainSettings,
    VerifySettings,
)
from spp_fx.version import VERSION

if TYPE_CHECKING:
    from spp_fx.verification.policy import Check
    from spp_fx.verification.verdict import Verified

FOLDER = click.Path(path_type=Path)
MODEL = click.Argument(["model"], default=".")
ADAPTER = click.Argument(["adapter"], type=FOLDER, default=Path())


def main() -> None:
    """Entry point: runs the command and turns errors into one clear line and an exit code."""
    code = run(sys.argv[1:])
    # The interpreter would collect garbage among all live objects before it exits. Nothing needs that: no
    # file, process or folder is left to a finalizer.
    gc.freeze()
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run a command line; returns 0 if it holds, 1 if it does not or failed, 2 for wrong usage."""
    # A terminated run cleans up its temporary folder as an interrupted one does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    debug = "--debug" in arguments
    try:
        code = cli.main(args=arguments, prog_name="spp-fx", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (see '{context.command_path} --help')" if context else ""
        return _failed(error.format_message().rstrip(".") + hint, error.exit_code, debug)
    except (click.Abort, KeyboardInterrupt) as error:
        left = "" if any(notes_of(error)) else "; no partial output was left"
        click.echo(f"spp-fx: interrupted{left}", err=True)
        _show_notes(error)
        return 130
    except SystemExit as error:
        _show_notes(error)
        raise
    except SppFxError as error:
        return _failed(str(error), error.exit_code, debug)
    except OSError as error:
        return _failed(str(error), 1, debug)
    except Exception as error:  # noqa: BLE001 - the last net: a bug is reported in one line, its trace with --debug
        _show_notes(error)
        return _failed(f"internal error: {type(error).__name__}: {error} (--debug shows where)", 1, debug)
    return code if isinstance(code, int) else 0


def _show_notes(error: BaseException) -> None:
    """Notes of an error, even with -q: they name hidden files, which may be large."""
    for note in notes_of(error):
        click.echo(f"spp-fx: {note}", err=True)


def _failed(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    click.echo(f"spp-fx: {message}", err=True)
    return code


@click.group(**HELP)
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


verb = partial(command, cli)
"""The decorator of a verb's function. It looks for the folders first: the imports of most verbs take seconds."""


@verb(
    "prune", MODEL, out_option("Folder to write. Default: MODEL-PATTERN."), force_option(), FRESH,
    RECIPE, CONFIG, REMOTE_CODE, registry=criteria,
)  # fmt: skip
def prune_command(
    output: Output,
    model: str,
    settings: PruneSettings,
    calibration: Calibration | None,
    method_options: dict[str, Any],
    out: Path | None,
    **options: Any,
) -> None:
    """Make a dense MODEL folder sparse and lock its masks.

    Calibrated methods walk the decoder layers one by one, with the weights of one in memory. An interrupted
    run continues at its last layer when the same command is run again.

    \b
    spp-fx prune my-model -o my-sparse --pattern 2:4
    spp-fx prune my-model -o my-sparse --method wanda --pattern 2:4 --calib text.txt
    spp-fx prune my-model --method sparsegpt --pattern 50% --calib text.txt --skip 'model.layers.0.*'
    spp-fx prune my-model --method wanda --repair dsnot --calib text.txt --ratio down_proj@4:8
    spp-fx prune my-model --method wanda --update admm --calib text.txt
    """
    folder = model_folder(model)
    from spp_fx.memory import return_large_blocks
    from spp_fx.verbs.prune import prune

    return_large_blocks()
    target = out or default_out(model, settings.pattern.replace(":", "of").replace("%", "pct"))
    with output.steps_bar("pruning") as bar:
        done = prune(
            folder, target, **vars(settings), **method_options, **options,
            calibration=calibration, tick=bar.update, say=output.say,
        )  # fmt: skip
    output.result(done)


@verb(
    "inject", MODEL, out_option("Folder to write. Default: MODEL-METHOD."), force_option(),
    click.Option(["--dry-run"], is_flag=True, help="Only show what would be trained; config.json alone is enough."),
    RECIPE, CONFIG, REMOTE_CODE, registry=methods, per_site=True,
)  # fmt: skip
def inject_command(
    output: Output,
    model: str,
    settings: InjectSettings,
    calibration: Calibration | None,
    method_options: dict[str, Any],
    out: Path | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """Make an adapter folder for a pruned MODEL folder, with a lock of its masks.

    A number of the method may be given again for some sites, NAME@VALUE, named as for --targets; the last match
    wins.

    \b
    spp-fx inject my-sparse
    spp-fx inject my-sparse --rank 8 --targets q_proj,v_proj -o small-adapter
    spp-fx inject my-sparse --init gradient --calib text.txt
    spp-fx inject my-sparse --rank 16 --rank down_proj@32 --rank 'model.layers.0.*@8' --scale q_proj@1
    spp-fx inject my-sparse --budget 0.3% --budget-by error --teacher my-model
    spp-fx inject llama-7b --dry-run --json
    """
    settings.check_text(calibration, dry_run)
    folder = model_folder(model)
    asked = vars(settings) | {"teacher": model_folder(settings.teacher) if settings.teacher else None}
    from spp_fx.verbs.inject import inject

    target = None if dry_run else out or default_out(model, settings.method)
    run = partial(
        inject, folder, target, **asked | method_options, **options, calibration=calibration, say=output.say
    )
    if settings.walks(dry_run):
        with output.steps_bar("walking the layers") as bar:
            done = run(walk_tick=bar.update)
    else:
        with output.bytes_bar("reading weights") as tick:
            done = run(tick=tick)
    output.result(done)


@verb(
    "reconstruct", MODEL, out_option("Folder to write. Default: MODEL-reconstructed."), force_option(), FRESH,
    CONFIG, REMOTE_CODE, registry=reconstructions,
)  # fmt: skip
def reconstruct_command(
    output: Output,
    model: str,
    settings: ReconstructSettings,
    calibration: Calibration,
    method_options: dict[str, Any],
    out: Path | None,
    **options: Any,
) -> None:
    """Bring each layer of a pruned MODEL close to that of the dense model, without moving a zero.

    Layers are changed one after another, with the weights of one in memory. The kept weights are trained, or an adapter
    that is then folded, until the layer makes what the dense model's makes of the text; or each matrix is solved for by
    itself (admm). An interrupted run continues at its last layer when the same command is run again.

    \b
    spp-fx reconstruct my-sparse --teacher my-model --calib text.txt
    spp-fx reconstruct my-sparse --teacher my-model --calib text.txt --method admm
    spp-fx reconstruct my-sparse --teacher my-model --calib text.txt --epochs 10 --train-norms -o better
    spp-fx reconstruct my-sparse --teacher my-model --calib text.txt --method spp --rank 16
    """
    folder, teacher = model_folder(model), model_folder(settings.teacher)
    from spp_fx.memory import return_large_blocks
    from spp_fx.verbs.reconstruct import reconstruct

    return_large_blocks()
    with output.steps_bar("reconstructing") as bar:
        done = reconstruct(
            folder, out or default_out(model, "reconstructed"),
            **vars(settings) | method_options | {"teacher": teacher}, **options,
            calibration=calibration, tick=bar.update, say=output.say,
        )  # fmt: skip
    output.result(done)


@verb("train", ADAPTER, RECIPE, CONFIG, REMOTE_CODE)
def train_command(
    output: Output, adapter: Path, texts: TrainData, settings: TrainSettings, **options: Any
) -> None:
    """Train an ADAPTER folder on text, instructions or chats; zeros of the base stay zero.

    Training continues from the adapter's current factors. With --teacher the loss is the divergence from the
    teacher's predictions, or a mixture with the text's loss and the distance of hidden states.

    \b
    spp-fx train my-sparse-spp --data text.txt --eval-data held-out.txt --steps 300
    spp-fx train my-sparse-spp --data text.txt --teacher my-model --teacher-weight 0.67 --temperature 2
    spp-fx train my-sparse-spp --data text.txt --teacher my-model --teacher-weight 0 --match-hidden 1
    spp-fx train my-sparse-spp --data alpaca.json --loss-on answer --packing --bf16 --epochs 3
    spp-fx train my-sparse-spp --config run.yaml --save-steps 100
    spp-fx train my-sparse-spp --config run.yaml --save-steps 100 --resume
    torchrun --nproc-per-node 8 -m spp_fx train my-sparse-spp --config run.yaml --shard world --packed
    """
    teacher = model_folder(texts.teacher) if texts.teacher else None
    if (recipe := click.get_current_context().meta.get("recipe")) and (line := recipe.doubt(adapter)):
        output.say(line)
    from spp_fx.training.distributed import leave
    from spp_fx.training.trainer import ProgressCallback
    from spp_fx.verbs.train import train

    with output.steps_bar("training") as bar:
        done = train(
            adapter, texts.data, settings, eval_data=texts.eval_data, teacher=teacher,
            base=texts.base, callbacks=[ProgressCallback(bar.update)], say=output.say, **options,
        )  # fmt: skip
    leave()
    output.result(done)


@verb(
    "teach", MODEL, out_option("Folder to write. Default: MODEL-taught."), force_option(), FRESH, REMOTE_CODE
)
def teach_command(
    output: Output, model: str, settings: TeachSettings, out: Path | None, **options: Any
) -> None:
    """Keep what a MODEL predicts for a text, to train from without the model: 'spp-fx train --teacher OUT'.

    Tokens are drawn from its predictions and kept with their counts, an unbiased sample of the whole distribution. A
    predicted token takes at most 3 bytes per sample and 5 more (5 per sample and 5 for vocabularies over 65,536), less
    where the model is sure. Training needs the same text, --seq-len, --loss-on and --packing. MODEL is a model folder
    or an adapter.

    \b
    spp-fx teach my-model --data text.txt --seq-len 512 -o taught
    spp-fx train my-sparse-spp --data text.txt --teacher taught --teacher-weight 0.67
    spp-fx teach my-model --data alpaca.json --loss-on answer --samples 64 --temperature 2
    """
    folder = model_folder(model)
    from spp_fx.verbs.teach import teach

    with output.steps_bar("teaching") as bar:
        done = teach(
            folder, out or default_out(model, "taught"), **vars(settings), **options,
            tick=bar.update, say=output.say,
        )  # fmt: skip
    output.result(done)


@verb("merge", ADAPTER, out_option("Folder to write. Default: ADAPTER-merged."), force_option(), FRESH)
def merge_command(
    output: Output, adapter: Path, settings: MergeSettings, out: Path | None, **options: Any
) -> None:
    """Fold an ADAPTER into its base model and prove that every mask is what it was.

    \b
    spp-fx merge my-sparse-spp --verify-sparsity
    cd my-sparse-spp && spp-fx merge --verify-sparsity -o ../merged
    """
    from spp_fx.verbs.merge import merge

    with output.bytes_bar("folding") as tick:
        done = merge(
            adapter, out or beside(adapter, "merged"), **vars(settings), **options, tick=tick, say=output.say
        )
    output.result(done)


@verb("verify", click.Argument(["artifact"], type=FOLDER, required=False), REMOTE_CODE)
def verify_command(
    output: Output, artifact: Path | None, settings: VerifySettings, trust_remote_code: bool
) -> int:
    """Check an ARTIFACT against its lock, a pattern or another artifact; exit 1 if it fails.

    ARTIFACT is a model, adapter or export folder, a .safetensors or an .onnx file. Without one, all artifacts
    of the policy file are checked, or the current folder if there is no policy.

    \b
    Exit codes: 0 everything holds
                1 something does not hold, cannot be read, or a report could not be written
                2 the command or the policy is wrong; nothing was checked

    \b
    spp-fx verify my-model --pattern 2:4
    spp-fx verify my-model --lock sparsity.lock.json --coverage all --junit report.xml
    spp-fx verify exported --against my-model --json
    spp-fx verify --policy spp-fx.toml --github --sarif report.sarif
    """
    from spp_fx.verification.policy import Overrides, Policy
    from spp_fx.verification.verdict import Verdicts

    asked: dict[str, Any] = vars(settings) | {"trust_remote_code": trust_remote_code}
    given = Overrides(**{each.name: asked[each.name] for each in fields(Overrides)})
    rules = Policy.find(settings.policy)
    if rules.path is not None:
        output.say(f"policy: {rules.path}")
    listed = artifact is None and rules.path is not None
    checks = rules.checks(given) if listed else [rules.check(artifact or Path(), given)]
    options = (("--junit", settings.junit, ".xml"), ("--sarif", settings.sarif, ".sarif"))
    reports = {option: (path, suffix) for option, path, suffix in options if path is not None}
    if reports:
        from spp_fx.verification.report import check_targets

        artifacts = [path for check in checks for path in (check.path, check.against) if path is not None]
        locks = {f"lock of {check.path}": check.lock for check in checks if check.lock is not None}
        check_targets(reports, artifacts, locks | ({"policy": rules.path} if rules.path else {}))
    verdicts = _verify(output, checks, settings.jobs)
    for verdict in verdicts:
        if verdict.error is not None:
            if click.get_current_context().params["debug"]:
                traceback.print_exception(verdict.error)
            if not listed and not output.as_json:  # nothing was checked: it fails as every command does
                click.echo("spp-fx: " + escaped(verdict.problems[0]), err=True)
    done = Verdicts(verdicts, listed)
    output.result(done)
    if reports or settings.github:
        _write_reports(output, verdicts, settings)
    return 0 if done.ok else 1


def _write_reports(output: Output, verdicts: "Sequence[Verified]", settings: VerifySettings) -> None:
    from spp_fx.verification import report

    root = report.Root.current()
    if settings.github:
        for line in report.annotations(verdicts, root):
            click.echo(line, err=output.as_json)
    step_summary = os.environ.get("GITHUB_STEP_SUMMARY") if settings.github else None
    report.write_reports(
        verdicts, root, junit_to=settings.junit, sarif_to=settings.sarif, summary_to=step_summary
    )


def _verify(output: Output, checks: "Sequence[Check]", jobs: int | None) -> "list[Verified]":
    from spp_fx.memory import keep_freed_memory
    from spp_fx.verbs.verify import MASK_BYTES, run_check

    keep_freed_memory(MASK_BYTES)
    # All before the first one runs: a wrong one must not cost the verdicts of the others.
    for check in checks:
        check.validate()
    verdicts: list[Verified] = []
    for check in checks:
        with output.bytes_bar(f"verifying {check.path}") as tick:
            verdicts.append(run_check(check, jobs=jobs, tick=tick))
    for note in dict.fromkeys(note for verdict in verdicts for note in verdict.notes):
        output.say(note)
    return verdicts


@verb(
    "export", MODEL, out_option("Folder to write. Default: MODEL-FORMAT."), force_option(), FRESH,
    click.Option(["--format"], required=True, metavar="NAME", help="The format to write, see above."),
    REMOTE_CODE, registry=formats, choice="format",
)  # fmt: skip
def export_command(
    output: Output, model: str, format: str, format_options: dict[str, Any], out: Path | None, **options: Any
) -> None:
    """Write a sparse MODEL folder in the form a runtime takes; checked from disk before it is reported as ok.

    \b
    cusparselt      2:4 packed for cuSPARSELt
    cutlass         2:4 packed for PyTorch's CUTLASS kernels
    onnx            ONNX, sparse initializers
    onnx-packed     ONNX, N:M weights packed, unpacked by standard operators
    onnx-dense      ONNX, dense constants that keep the pattern (TensorRT --sparsity=enable)
    safetensors     the plain folder that servers load
    sparse-bitmask  values and bitmasks: compact, any pattern, given back bit for bit by 'spp-fx unpack'

    \b
    spp-fx export my-merged --format cusparselt --sm 90 --dtype bfloat16
    spp-fx export my-merged --format onnx-packed --with-past
    spp-fx export my-merged --format safetensors
    """
    folder, target = model_folder(model), out or default_out(model, format)
    from spp_fx.verbs.export import export

    with output.bytes_bar("exporting") as tick:
        done = export(folder, target, format, **format_options, **options, tick=tick, say=output.say)
    output.result(done)


@verb(
    "unpack", click.Argument(["export"], type=FOLDER, default=Path()),
    out_option("Folder to write. Default: EXPORT-unpacked."), force_option(),
)  # fmt: skip
def unpack_command(output: Output, export: Path, out: Path | None, force: bool) -> None:
    """Write the plain model folder that an EXPORT was made from; read back before it is reported as ok.

    sparse-bitmask and safetensors give the weight files back byte for byte, packed formats one
    model.safetensors. A legacy compressed-tensors folder (sparse-24-bitmask) is made plain, too.

    \b
    spp-fx unpack my-merged-sparse-bitmask -o my-merged
    spp-fx unpack legacy-model -o plain-model
    """
    from spp_fx.verbs.unpack import unpack

    with output.bytes_bar("unpacking") as tick:
        done = unpack(export, out or beside(export, "unpacked"), force, tick=tick, say=output.say)
    output.result(done)


@verb(
    "lock", MODEL, out_option("Lock file to write. Default: MODEL/sparsity.lock.json."),
    force_option("Replace the lock if it exists."), REMOTE_CODE,
)  # fmt: skip
def lock_command(
    output: Output, model: str, settings: LockSettings, out: Path | None, **options: Any
) -> None:
    """Write the lock of a sparse MODEL that has none: pattern and mask of every sparse weight.

    MODEL is a model folder, pruned by any tool, or a single .safetensors file. Without --pattern, dense
    weights are left out, each with its reason; with it, every matched weight must hold the pattern.

    \b
    spp-fx lock my-sparse --pattern 2:4
    spp-fx lock my-sparse -o locks/my-sparse.lock.json
    spp-fx lock my-sparse --force --json
    """
    from spp_fx.sparsity.lock import LOCK_NAME
    from spp_fx.verbs.write_lock import lock

    # The folder of a hub model is in a cache: its lock goes to the current folder.
    target = out or (None if Path(model).exists() else Path(LOCK_NAME))
    with output.bytes_bar("locking") as tick:
        done = lock(model_folder(model), target, **vars(settings), **options, tick=tick, say=output.say)
    output.result(done)


@verb("inspect", MODEL, click.Option(["--task"], metavar="NAME", help=TASK), REMOTE_CODE)
def inspect_command(output: Output, model: str, task: str | None, trust_remote_code: bool) -> None:
    """Show the sites of a MODEL folder, their patterns, and which inject would take.

    \b
    spp-fx inspect my-sparse
    spp-fx inspect my-vision-model --task image-text-to-text
    """
    folder = model_folder(model)
    from spp_fx.verbs.inspect import inspect

    with output.bytes_bar("reading weights") as tick:
        done = inspect(folder, task=task, trust_remote_code=trust_remote_code, tick=tick)
    for note in done.notes:
        output.say(note)
    output.result(done)


@verb("eval", click.Argument(["models"], nargs=-1, metavar="[MODEL]..."), REMOTE_CODE)
def eval_command(
    output: Output, models: tuple[str, ...], settings: EvaluateSettings, trust_remote_code: bool
) -> None:
    """Perplexity of a text, or scores of tasks, under each MODEL: a model folder, adapter or export (not ONNX).

    An adapter is evaluated as the model that merge would write, without writing it. Data is read as in train.
    Instructions and chats are measured as the whole text that the model would see, as --loss-on all does.
    Models for other tasks than language modeling are measured on records of their task (docs/tasks.md).

    \b
    spp-fx eval my-merged --data held-out.txt
    spp-fx eval dense sparse sparse-spp --data held-out.txt --seq-len 2048 --stride 512
    spp-fx eval my-merged --tasks zero-shot,mmlu --batch-size 8
    spp-fx eval my-merged --tasks my-task.yaml --limit 100
    spp-fx eval my-t5 my-t5-merged --data pairs.jsonl --generate
    """
    folders = [model_folder(model) for model in models or (".",)]
    from spp_fx.verbs.evaluate import evaluate_all

    with output.steps_bar("evaluating") as bar:
        done = 0

        def tick(what: str, count: int) -> None:
            nonlocal done
            done += count
            bar.update(done, item=what)

        compared = evaluate_all(
            folders, settings, trust_remote_code=trust_remote_code, tick=tick, say=output.say
        )
    output.result(compared.models[0] if len(folders) == 1 else compared)


@verb(
    "recipes", click.Argument(["name"], required=False),
    click.Option(["--devices"], type=click.IntRange(1), help="Devices that share the rows of a step. Default: 1."),
)  # fmt: skip
def recipes_command(output: Output, name: str | None, devices: int | None) -> None:
    """List the papers' settings, or print those of NAME as a file for --config.

    \b
    spp-fx recipes
    spp-fx recipes spp-llama-7b --devices 8 > run.yaml
    spp-fx inject my-sparse --config run.yaml
    spp-fx train my-sparse-spp --config run.yaml --data alpaca.json
    """
    from spp_fx.verbs.recipes import list_recipes

    output.result(list_recipes(name, devices))


@verb("opt", MODEL, REMOTE_CODE)
def opt_command(
    output: Output,
    model: str,
    settings: OptimizeSettings,
    calibration: Calibration | None,
    trust_remote_code: bool,
) -> None:
    """Run a PIPELINE of passes over a MODEL's program and show what each did, site by site.

    \b
    spp-fx opt my-sparse -p 'canonicalize,match,inject{rank=8},lower{kernel=fused}' --print-after-all
    spp-fx opt my-model --calib text.txt -p 'canonicalize,match{dense=true},partition,prune{method=wanda}'
    """
    folder = model_folder(model)
    from spp_fx.verbs.opt import optimize

    done = optimize(
        folder, settings.pipeline, print_after_all=settings.print_after_all, calibration=calibration,
        after=lambda run: None if output.as_json else output.show(run.lines()),
        trust_remote_code=trust_remote_code, say=output.say,
    )  # fmt: skip
    if output.as_json:
        output.result(done)


@verb("demo", out_option("Leave everything there. Default: a temporary folder."))
def demo_command(output: Output, out: Path | None) -> None:
    """End to end on a small model, offline: train it, prune, recover, merge, verify, export.

    \b
    spp-fx demo
    spp-fx demo -o demo-files
    """
    from spp_fx.verbs.demo import demo

    output.result(demo(out, output))
