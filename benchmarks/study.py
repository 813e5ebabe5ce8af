"""Which method wins back most after pruning? Every method at equal trained parameters and steps, and SPP's ablations.

    make study
    python benchmarks/study.py --models demo --criteria wanda --patterns 2:4 --seeds 1 --steps 40

Every finished run is a line of --results, and is not run again: a study that was stopped goes on where it was. Each
method trains at multiples of its suggested rate until the lowest training loss has a higher one on each side, then at
the best one with the other seeds. --report alone writes the tables and pictures from the results. On two cores the
whole takes about an hour and a quarter.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # for tests.traces
CRITERIA, PATTERNS = ("wanda", "sparsegpt"), ("2:4", "2:8", "50%", "75%")
METHODS = ("spp", "hira", "sqft", "lors", "scale-lora", "lora-star", "masked-full")
RANK = 16
PUBLISHED = {"spp": 4e-3, "sqft": 3e-4, "lors": 2e-5}
"""The papers' rates for models of 7 billion parameters."""
CALIBRATED = ("gradient", "reconstruct")
"""Starts that `spp-fx inject --init` takes from a text."""
MULTIPLES = (0.5, 1.0, 2.0)
MOST_RATES = 6
DENSE_STEPS = 900


@dataclass(frozen=True)
class Variant:
    """One thing to train.

    Attributes:
        group: the table that it belongs to.
        lr: a fixed rate; None: the best of a grid.
        default: train by `spp-fx train` without a rate.
        equal: choose the rank by SPP's number of parameters.
        start: of SPP's factors, see `ablations.STARTS`; or of any method's, one of CALIBRATED.
    """

    group: str
    name: str
    method: str
    rank: int | None = None
    lr: float | None = None
    default: bool = False
    equal: bool = False
    start: str | None = None

    @property
    def what(self) -> str:
        """What is trained, whichever table asks for it."""
        return json.dumps([self.method, self.rank, self.lr, self.default, self.equal, self.start])


@dataclass(frozen=True)
class Case:
    """A pruned model, and the texts that it is trained and measured on."""

    model: str
    criterion: str
    pattern: str
    dense: Path
    pruned: Path
    text: Path
    valid: Path
    window: int = 128

    @property
    def key(self) -> tuple[str, str, str]:
        return self.model, self.criterion, self.pattern


@dataclass(frozen=True)
class Settings:
    """What all runs share."""

    results: Path
    work: Path
    steps: int
    batch: int
    seeds: int
    known: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False, compare=False)


def variants(ablated: bool) -> Iterator[Variant]:
    """What is trained on a pruned model; `ablated`: the paper's ablations, too."""
    for method in METHODS:
        yield Variant(
            "methods", method, method, rank=RANK if method == "spp" else None, equal=method != "spp"
        )
    if not ablated:
        return
    from common.ablations import STARTS

    yield Variant("defaults", "train without a rate", "spp", rank=RANK, default=True)
    for method, lr in PUBLISHED.items():
        yield Variant(
            "defaults", f"{method} at its paper's rate", method, rank=RANK if method == "spp" else None,
            equal=method != "spp", lr=lr,
        )  # fmt: skip
    yield Variant("start", "beta zero", "spp", rank=RANK)
    for start in (*STARTS, *CALIBRATED):
        yield Variant("start", start, "spp", rank=RANK, start=start)
    yield Variant("start-lors", "left factor zero", "lors", equal=True)
    for start in CALIBRATED:
        yield Variant("start-lors", start, "lors", equal=True, start=start)
    yield Variant("form", "residual", "spp", rank=RANK)
    yield Variant("form", "multipliers from 1", "spp-multipliers", rank=RANK)
    yield Variant("form", "residual without beta", "spp-without-beta", rank=RANK)
    for rank in (4, 8, 16, 32, 64):
        yield Variant("rank", f"r = {rank}", "spp", rank=rank)


def trace_once() -> None:
    """Make a process trace each model once, and take one core: it trains the same model hundreds of times."""
    import torch

    import spp_fx.graph.trace as tracing
    from tests import traces

    torch.set_num_threads(1)
    tracing.trace = traces.once(tracing.trace)  # before the verbs take it from there


def run_variant(case: Case, variant: Variant, settings: Settings) -> str:
    """Every run of a variant that is not in the results yet; returns a line to show."""
    import common.ablations  # noqa: F401 - registers SPP's variants

    def run(multiple: float | None, seed: int) -> dict[str, Any]:
        name = json.dumps([*case.key, variant.what, multiple, seed])
        if name not in settings.known:
            found = one_run(case, variant, settings, multiple, seed)
            found |= {"run": name, "what": variant.what, "seed": seed, "multiple": multiple}
            settings.known[name] = found
            with settings.results.open("a") as file:
                file.write(json.dumps(found) + "\n")
        return settings.known[name]

    best: float | None = None
    if variant.lr is None and not variant.default:
        grid = {multiple: run(multiple, 0)["loss"] for multiple in MULTIPLES}
        while len(grid) < MOST_RATES:
            best = min(grid, key=grid.__getitem__)
            if min(grid) < best < max(grid):
                break
            next_one = best / 2 if best == min(grid) else best * 2
            grid[next_one] = run(next_one, 0)["loss"]
        best = min(grid, key=grid.__getitem__)
    runs = [run(best, seed) for seed in range(settings.seeds)]
    values = ", ".join(f"{each['perplexity']:.2f}" for each in runs)
    return f"{' '.join(case.key)}, {variant.group}: {variant.name}: {values}"


def one_run(
    case: Case, variant: Variant, settings: Settings, multiple: float | None, seed: int
) -> dict[str, Any]:
    """Inject, train and measure once."""
    from common.ablations import STARTS, set_start

    from spp_fx.verbs.evaluate import evaluate
    from spp_fx.verbs.inject import inject
    from spp_fx.verbs.load import load_program
    from spp_fx.verbs.rate import suggested
    from spp_fx.verbs.settings import Calibration, TrainSettings
    from spp_fx.verbs.train import train

    adapter = settings.work / f"adapter-{os.getpid()}"
    options: dict[str, Any] = {} if variant.rank is None else {"rank": variant.rank}
    if variant.equal and variant.method != "masked-full":
        options["budget"] = parameters_of_spp(case.pruned)
    if variant.start in CALIBRATED:
        calibration = Calibration(case.text, samples=32, seq_len=case.window, seed=seed)
        options |= {"init": variant.start, "calibration": calibration}
        if variant.start == "reconstruct":
            options["teacher"] = case.dense
    if variant.method in ("sqft", "lora-star"):
        options["dropout"] = 0.0  # as the others
    injected = inject(case.pruned, adapter, method=variant.method, seed=seed, force=True, **options)
    if variant.start in STARTS:
        set_start(adapter, variant.start, seed)
    lr = variant.lr
    if multiple is not None:
        program = load_program(adapter)
        lr = multiple * suggested(adapter, program.program, program.model)(settings.steps)
    training = TrainSettings(
        steps=settings.steps, lr=lr, batch_size=settings.batch, seq_len=case.window, seed=seed, force=True,
        logging_steps=max(1, settings.steps // 10),
    )  # fmt: skip
    start = time.process_time()
    trained = train(adapter, case.text, training)
    seconds = time.process_time() - start
    row = {
        "model": case.model, "criterion": case.criterion, "pattern": case.pattern,
        "method": variant.method, "lr": trained.lr, "steps": trained.steps, "parameters": injected.trainable,
        "loss": sum(trained.losses[-2:]) / len(trained.losses[-2:]), "losses": trained.losses,
        "perplexity": evaluate(adapter, case.valid, seq_len=case.window).result.perplexity,
        "cpu_seconds": round(seconds, 2),
    }  # fmt: skip
    if seed == 0 and multiple in (1.0, None):
        row |= cost(adapter, settings.batch, case.window)
    shutil.rmtree(adapter)
    return row


@cache
def parameters_of_spp(pruned: Path) -> int:
    """How many numbers SPP of RANK trains on a model."""
    from spp_fx.verbs.inject import inject

    return inject(pruned, None, method="spp", rank=RANK).trainable


def cost(adapter: Path, batch: int, window: int) -> dict[str, float]:
    """CPU time of a step's forward and backward on one thread, and what it allocates at most beside the weights."""
    import torch
    from common.timing import cpu_peak

    from spp_fx.verbs.load import load_program

    program = load_program(adapter).program.train()
    ids = torch.randint(program.vocabulary, (batch, window), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        program.zero_grad()
        loss = program(ids, labels=ids).loss
        assert loss is not None
        loss.backward()

    times: list[float] = []
    for _ in range(6):
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    return {"step_ms": round(1e3 * median(times[1:]), 1), "peak_mib": round(cpu_peak(step) / 2**20, 1)}


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Prune every model to every pattern; a model that is not there is skipped, and stderr says why."""
    for model in options.models:
        made = (
            story(options.story) if model == "story-656k" else demo_model(options.work, options.dense_steps)
        )
        if made is None:
            where = options.story or "give --story, or SPP_FX_DATA"
            print(f"study: {model} is skipped: its folder is not there ({where})", file=sys.stderr)
            continue
        dense, text, valid = made
        reference(model, dense, valid, options.results)
        for criterion in options.criteria:
            for pattern in options.patterns:
                pruned = options.work / f"{model}-{criterion}-{pattern.replace(':', 'of').replace('%', '')}"
                case = Case(model, criterion, pattern, dense, pruned, text, valid)
                if not pruned.exists():
                    prune_to(case)
                reference(f"{model} {criterion} {pattern}", pruned, valid, options.results)
                yield case


def prune_to(case: Case) -> None:
    from spp_fx.verbs.prune import prune
    from spp_fx.verbs.settings import Calibration

    calibration = Calibration(case.text, samples=64, seq_len=case.window)
    prune(case.dense, case.pruned, method=case.criterion, pattern=case.pattern, calibration=calibration)


def reference(name: str, model: Path, valid: Path, results: Path) -> None:
    """Note the perplexity of an untrained model once."""
    from spp_fx.verbs.evaluate import evaluate

    run = json.dumps(["reference", name])
    if run not in read(results):
        value = evaluate(model, valid, seq_len=128).result.perplexity
        with results.open("a") as file:
            file.write(json.dumps({"run": run, "reference": name, "perplexity": value}) + "\n")


def story(folder: Path | None) -> tuple[Path, Path, Path] | None:
    """story-656k with stories that it told and held-out ones, where the data folder is there."""
    data = folder or Path(os.environ.get("SPP_FX_DATA", ROOT.parent / "shared" / "data"))
    found = (data / "story-656k", data / "tinystories" / "generated.txt", data / "tinystories" / "valid.txt")
    return found if all(path.exists() for path in found) else None


def demo_model(work: Path, steps: int) -> tuple[Path, Path, Path]:
    """The model that `spp-fx demo` trains on Python's help topics."""
    from spp_fx.verbs.demo import train_model, write_text

    text, valid = write_text(work)
    if not (work / "demo").exists():
        partial = work / f"demo-{os.getpid()}"
        train_model(partial, text, steps, lambda *_: None)
        partial.rename(work / "demo")
    return work / "demo", text, valid


def read(results: Path) -> dict[str, dict[str, Any]]:
    """The finished runs by name; a last line that was cut short is not one."""
    if not results.exists():
        return {}
    rows: dict[str, dict[str, Any]] = {}
    for line in results.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["run"]] = row
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "study.jsonl")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="gets recovery.md and its pictures")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "study", help="models and pruned models"
    )
    parser.add_argument("--story", type=Path, help="folder with story-656k/ and tinystories/")
    parser.add_argument("--models", nargs="+", choices=("story-656k", "demo"), default=["story-656k", "demo"])
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA))
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="names of what is trained, as the tables have them")
    parser.add_argument("--dense-steps", type=int, default=DENSE_STEPS, help="of training the demo's model")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--report", action="store_true", help="train nothing")
    options = parser.parse_args()
    from common import study_report

    every = list(variants(ablated=True))
    if unknown := set(options.only or ()) - {variant.name for variant in every}:
        parser.error(f"--only {min(unknown)}: there are {', '.join(variant.name for variant in every)}")
    if not options.report:
        train_all(options)
    if not (rows := list(read(options.results).values())):
        parser.error(f"{options.results} holds no runs")
    study_report.write(rows, every, options.docs)
    results = [row for row in rows if "reference" not in row]
    print(json.dumps({"question": "which method wins back most", "results": results}, indent=1))


def train_all(options: argparse.Namespace) -> None:
    options.work.mkdir(parents=True, exist_ok=True)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    settings = Settings(options.results, options.work, options.steps, options.batch, options.seeds)
    trace_once()
    context = get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context, initializer=trace_once) as pool:
        waiting = []
        for case in cases(options):
            ablated = case.criterion == options.criteria[0] and case.pattern == options.patterns[0]
            known = {
                name: row
                for name, row in read(options.results).items()
                if json.loads(name)[:3] == list(case.key)
            }
            asked = [each for each in variants(ablated) if not options.only or each.name in options.only]
            for variant in {each.what: each for each in asked}.values():
                waiting.append(pool.submit(run_variant, case, variant, replace(settings, known=known)))
        for done in as_completed(waiting):
            print(done.result(), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
