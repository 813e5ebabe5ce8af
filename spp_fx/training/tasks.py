"""Tasks of lm-evaluation-harness: found by name or file, asked of a model, scored as the harness does."""

import random
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from io import StringIO
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spp_fx.errors import UsageError, escaped
from spp_fx.registry import did_you_mean

SUITES: Final[Mapping[str, tuple[str, ...]]] = {
    "zero-shot": (
        "boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa",
    ),
}  # fmt: skip
"""Names for several tasks. zero-shot: the seven that the papers of Wanda and SPP report."""

SHOTS: Final[Mapping[str, int]] = {"mmlu": 5}
"""Examples in the prompt where the papers' number is not the harness' own."""


@dataclass(frozen=True)
class Tasks:
    """Tasks that the harness has loaded, with their documents.

    Attributes:
        names: the tasks that were asked for, and the groups that have a number of their own in place of their tasks.
        loaded: what the harness' `evaluate` takes.
    """

    names: tuple[str, ...]
    loaded: Mapping[str, Any]


@dataclass(frozen=True)
class Scores:
    """What a model reached.

    Attributes:
        names: of `Tasks`.
        metrics: by task and group, under the harness' own names: `acc,none`, `acc_stderr,none`.
        shots, samples: examples in the prompt, and documents, of each task.
    """

    names: tuple[str, ...]
    metrics: Mapping[str, Mapping[str, float | None]]
    shots: Mapping[str, int]
    samples: Mapping[str, int]

    def main(self, name: str) -> str:
        """A task's first metric: the accuracy where it has one."""
        keys = [key for key in self.metrics[name] if not _is_error(key)]
        return next((key for key in keys if key.startswith("acc,")), keys[0])

    @property
    def mean_accuracy(self) -> float | None:
        """Mean of the accuracies of the tasks asked for, as the papers give it; None for one, or without."""
        mains = [self.main(name) for name in self.names]
        if len(mains) < 2 or any(not key.startswith("acc,") for key in mains):
            return None
        values = [self.metrics[name][key] for name, key in zip(self.names, mains, strict=True)]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if len(known) == len(values) else None

    def to_json(self) -> dict[str, Any]:
        return {
            name: {**values, "n-shot": self.shots.get(name), "n-samples": self.samples.get(name)}
            for name, values in self.metrics.items()
        }

    def rows(self) -> Iterator[tuple[str, str, str, str, str]]:
        """Task, shots, metric, value and standard error of every metric of the tasks asked for."""
        for name in self.names:
            for key, value in self.metrics[name].items():
                if _is_error(key):
                    continue
                metric, _, filtered = key.partition(",")
                error = self.metrics[name].get(f"{metric}_stderr,{filtered}")
                shown = metric if filtered in ("", "none") else key
                shots = self.shots.get(name)
                yield name, "-" if shots is None else str(shots), shown, number(value), number(error)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _is_error(key: str) -> bool:
    return "_stderr" in key


def find_tasks(names: Sequence[str], shots: int | None = None) -> Tasks:
    """Load tasks by name (of the harness, or of `SUITES`), or from YAML files or folders of them.

    Args:
        names: a path is what exists, or ends in .yaml; of a folder all tasks are taken.
        shots: examples in the prompt; None: each task's own, else those of `SHOTS`, else none.

    Raises:
        UsageError: lm-evaluation-harness is not installed; there is no such task; one cannot be loaded, such as one
            whose documents cannot be downloaded; a task is asked for twice.
    """
    wanted = [each for name in names for each in SUITES.get(name, (name,))]
    for name in wanted:
        if _is_path(name) and not Path(name).exists():
            raise UsageError(f"--tasks: {escaped(name)}: there is no such file")
    kind = _harness("lm_eval.tasks").TaskManager
    with _quiet():
        manager = _manager(kind, wanted)
        merged: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
        found: list[str] = []
        # A name that does not exist is an error before the documents of others are downloaded.
        for name, specs in [(name, _specs(kind, name, manager)) for name in wanted]:
            for spec in specs:
                part = _load(manager, name, spec)
                if twice := sorted(part["tasks"].keys() & merged["tasks"].keys()):
                    raise UsageError(f"--tasks: {escaped(twice[0])} is asked for twice")
                for task in part["tasks"].values():
                    _set_shots(task, SHOTS.get(name) if shots is None else shots)
                found += _scored(part)
                for key, table in merged.items():
                    table |= part[key]
    return Tasks(tuple(found), merged)


def _scored(part: Mapping[str, Any]) -> list[str]:
    """What has a number of its own: groups that sum up their tasks, and the tasks that are in none of these."""
    groups = [name for name, group in part["groups"].items() if group.has_aggregation]
    inside, waiting = set[str](), [*groups]
    while waiting:
        members = part["group_map"].get(waiting.pop(), ())
        waiting += [each for each in members if each not in inside]
        inside.update(members)
    return [each for each in (*groups, *part["tasks"]) if each not in inside]


def _harness(module: str) -> Any:
    """A module of lm-evaluation-harness, which is an optional package."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UsageError(
            "--tasks needs lm-evaluation-harness, which cannot be imported "
            f"({error}); install it with: pip install 'spp-fx[tasks]'"
        ) from error


def _manager(kind: Any, wanted: Sequence[str]) -> Any:
    """The harness' index of tasks. Its own ones, ten thousand files, take seconds: only where they may be meant."""
    folders = [str(Path(name).resolve()) for name in wanted if Path(name).is_dir()]
    try:
        own = kind(include_path=folders, include_defaults=False)
        groups = own.all_groups or any(_holds_group(Path(name)) for name in wanted if Path(name).is_file())
        if not groups and all(_is_path(name) for name in wanted):
            return own
        return kind(include_path=folders)
    except (OSError, ValueError) as error:
        raise UsageError(f"--tasks: the tasks cannot be read: {_said(error)}") from error


def _is_path(name: str) -> bool:
    return Path(name).exists() or name.endswith((".yaml", ".yml"))


def _holds_group(path: Path) -> bool:
    text = path.read_text(encoding="utf-8", errors="replace")
    return any(line.startswith("group:") for line in text.splitlines())


def _specs(kind: Any, name: str, manager: Any) -> list[str]:
    """What the harness calls the tasks of a name, a file or a folder: groups first, then what is in none."""
    path = Path(name)
    if path.is_dir():
        inside = kind(include_path=str(path.resolve()), include_defaults=False)
        if not inside.all_subtasks and not inside.all_groups:
            raise UsageError(
                f"--tasks: {escaped(name)}: holds no task: no .yaml file in it has a 'task' or 'group'"
            )
        entries = [inside.task_index[each] for each in inside.all_groups]
        taken = {
            str(each)
            for entry in entries
            for each in (entry.cfg or {}).get("task", [])
            if isinstance(each, str)
        }
        return [each for each in (*inside.all_groups, *inside.all_subtasks) if each not in taken]
    if path.is_file():
        return [str(path.resolve())]
    if name not in manager.all_tasks:
        hint = did_you_mean(name, manager.all_tasks) or "; 'lm-eval ls tasks' lists them"
        raise UsageError(f"--tasks: lm-evaluation-harness has no task '{escaped(name)}'{hint}")
    return [name]


def _load(manager: Any, name: str, spec: str) -> Any:
    try:
        return manager.load([spec])
    except Exception as error:
        raise UsageError(f"--tasks: {escaped(name)}: cannot be loaded: {_said(error)}") from error


def _said(error: BaseException) -> str:
    said = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    return f"{type(error).__name__}: {said[:400]}" if said else type(error).__name__


def _set_shots(task: Any, shots: int | None) -> None:
    """As the harness' own command line: a task that says 0 keeps it, and its own number counts where none is given."""
    own = task.get_config("num_fewshot")
    if shots is not None and own != 0:
        task.set_config(key="num_fewshot", value=shots)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    *,
    limit: int | None = None,
    batch_size: str = "1",
    tick: Callable[[int], None] = lambda n: None,
) -> Scores:
    """Ask a model the tasks. The scores are those of the harness' own command line on the model's folder.

    Args:
        limit: documents of each task at most.
        batch_size: rows of a forward; "auto": as many as fit.
        tick: called with the number of rows of each forward.
    """
    with _quiet():
        harness, seeds = _harness("lm_eval"), _harness("lm_eval.defaults")
        base: Any = _harness("lm_eval.models.huggingface").HFLM

        class Counting(base):
            """The harness' model, which reports its forwards."""

            def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
                tick(len(inps))
                return super()._model_call(inps, *args, **kwargs)

            def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
                tick(len(context))
                return super()._model_generate(context, *args, **kwargs)

        random.seed(seeds.DEFAULT_RANDOM_SEED)
        np.random.seed(seeds.DEFAULT_OTHER_SEED)
        torch.manual_seed(seeds.DEFAULT_OTHER_SEED)
        for task in tasks.loaded["tasks"].values():
            task.set_fewshot_seed(seed=seeds.DEFAULT_OTHER_SEED)
        language_model = Counting(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        result: Any = harness.evaluate(
            language_model, task_dict=dict(tasks.loaded), limit=limit, log_samples=False
        )
    metrics = {**result["results"], **result.get("groups", {})}
    return Scores(
        tasks.names,
        {name: own for name, values in metrics.items() if (own := _numbers(values))},
        {name: int(count) for name, count in result["n-shot"].items()},
        {name: int(count["effective"]) for name, count in result["n-samples"].items()},
    )


def _numbers(values: Mapping[str, Any]) -> dict[str, float | None]:
    """The metrics among a task's values; a standard error that the harness does not compute is None."""
    return {
        key: float(value) if isinstance(value, int | float) else None
        for key, value in values.items()
        if "," in key
    }


@contextmanager
def _quiet() -> Generator[None]:
    """Keep the harness' log, and its prints and bars, which cannot be switched off, out of the output."""
    from tqdm import tqdm

    log, begin = getLogger("lm_eval"), tqdm.__init__
    level = log.level

    def silent(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs | {"disable": True})

    log.setLevel(ERROR)
    tqdm.__init__ = silent  # type: ignore[method-assign]
    try:
        with redirect_stdout(StringIO()):  # of --batch-size auto
            yield
    finally:
        log.setLevel(level)
        tqdm.__init__ = begin  # type: ignore[method-assign]
