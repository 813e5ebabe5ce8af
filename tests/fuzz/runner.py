"""Many cases over several processes, each with a limit on its memory; a process that dies names its case."""

import multiprocessing
import resource
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.fuzz.seeds import Seed

MEMORY = 2 << 30
"""Address space that a case may take beyond what the process holds before it, in bytes."""
STUCK = 1200.0
"""Seconds without an answer after which a process is taken for hung in code that no signal reaches."""


@dataclass
class Report:
    """The count of everything."""

    outcomes: list[dict[str, Any]]

    @property
    def failures(self) -> list[dict[str, Any]]:
        from tests.fuzz.oracle import FAILURES

        return [each for each in self.outcomes if each["outcome"] in FAILURES]

    def to_json(self, shown: int = 50) -> dict[str, Any]:
        """Counts, and the first failures with what reproduces them."""
        failed = sorted(self.failures, key=lambda each: each["case"])
        refused = Counter(each["detail"] for each in self.outcomes if each["outcome"] == "refused")
        return {
            "cases": len(self.outcomes),
            "kinds": dict(sorted(Counter(each["kind"] for each in self.outcomes).items())),
            "outcomes": dict(sorted(Counter(each["outcome"] for each in self.outcomes).items())),
            "refused": dict(sorted(refused.items())),
            **{
                word.replace(" ", "_"): sum(each["outcome"] == word for each in failed)
                for word in ("crash", "hang", "false ok", "false alarm", "unclean message")
            },
            "failures": failed[:shown],
        }


def run_here(seeds: dict[str, Seed], numbers: Iterable[int], seed: int = 0) -> Report:
    """Run cases in this process, which ends with the first that kills it."""
    from tests.fuzz.oracle import run_case

    _warm_up(seeds)
    with _limited_memory():
        return Report([run_case(seeds, seed, number).to_json() for number in numbers])


def run(seeds: dict[str, Seed], numbers: Iterable[int], seed: int = 0, jobs: int = 2) -> Report:
    """Run cases; a fresh process goes on after one that died or hung."""
    context = multiprocessing.get_context("spawn")
    todo, outcomes = list(numbers)[::-1], []
    busy: dict[Connection, tuple[Any, int]] = {}

    def start() -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, seeds, seed), daemon=True)
        process.start()
        theirs.close()
        _feed(ours, process)

    def _feed(pipe: Connection, process: Any) -> None:
        if todo:
            number = todo.pop()
            pipe.send(number)
            busy[pipe] = process, number
        else:
            pipe.send(None)
            process.join()

    for _ in range(min(jobs, len(todo))):
        start()
    while busy:
        ready = wait(list(busy), timeout=STUCK)
        for pipe in ready or list(busy):
            process, number = busy.pop(pipe)  # type: ignore[index]
            try:
                if not ready:
                    process.kill()
                outcomes.append(pipe.recv())  # type: ignore[union-attr]
                _feed(pipe, process)  # type: ignore[arg-type]
            except EOFError:
                process.join()
                what = "crash" if ready else "hang"
                kinds = list(seeds)
                outcomes.append(
                    {
                        "case": number,
                        "kind": kinds[number % len(kinds)],
                        "outcome": what,
                        "detail": f"the process ended with {process.exitcode}",
                        "done": "run it with --case",
                    }
                )
                if todo:
                    start()
    return Report(outcomes)


def _work(pipe: Connection, seeds: dict[str, Seed], seed: int) -> None:
    import torch

    torch.set_num_threads(1)
    _quiet()
    from tests.fuzz.oracle import run_case

    _warm_up(seeds)
    with _limited_memory():
        while (number := pipe.recv()) is not None:
            pipe.send(run_case(seeds, seed, number).to_json())


def _warm_up(seeds: dict[str, Seed]) -> None:
    """What is imported or compiled once must not count against a case."""
    from spp_fx import runtime
    from spp_fx.verbs.merge import merge
    from spp_fx.verbs.unpack import unpack
    from spp_fx.verbs.verify import verify

    for seed in seeds.values():
        verify(seed.path)
    for kind in seeds.keys() & {"model", "sharded", "lone"}:
        verify(seeds[kind].path, pattern="2:4", against=seeds[kind].path)
    with tempfile.TemporaryDirectory() as folder:
        for kind in seeds.keys() & {"cusparselt", "sparse-bitmask", "legacy"}:
            unpack(seeds[kind].path, Path(folder, kind))
        if "adapter" in seeds:
            merge(seeds["adapter"].path, Path(folder, "merged"))
    if "cusparselt" in seeds:
        runtime.load(seeds["cusparselt"].path)


def _quiet() -> None:
    import warnings

    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextmanager
def _limited_memory() -> Iterator[None]:
    held = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize")
    )
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int(held.split()[1]) * 1024 + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def only(kinds: Sequence[str], seeds: dict[str, Seed]) -> dict[str, Seed]:
    """Some of the kinds, in their order; all if none is named."""
    return {kind: seed for kind, seed in seeds.items() if not kinds or kind in kinds}
