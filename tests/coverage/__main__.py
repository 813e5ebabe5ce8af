"""`python -m tests.coverage`: probe every type of every task and write docs/models.md; goes on where it was stopped."""

import argparse
import os
import sys
from pathlib import Path

# torch reads it while it is imported; see tests/conftest.py.
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # a process that forks may have no threads

import tests.coverage.quiet  # noqa: F401 - it sets the process up while it is imported
from tests.coverage import runner, table
from tests.coverage.models import TASKS

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "spp-fx" / "coverage.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.coverage", description=__doc__)
    parser.add_argument("types", nargs="*", help="only these; the page is then left as it is")
    parser.add_argument("--task", action="append", choices=TASKS, help="only types of these tasks")
    parser.add_argument("--third", action="store_true", help="only the fixed third of every submission")
    parser.add_argument("--without", action="append", default=[], help="leave out a column that is slow")
    parser.add_argument("--seconds", type=int, default=runner.SECONDS, help="CPU time of a type")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=CACHE, help="the file of rows")
    parser.add_argument(
        "--keep-whole", action="store_true", help="keep rows without a failure, of any sources"
    )
    parser.add_argument("--keep-all", action="store_true", help="keep all rows, of any sources")
    options = parser.parse_args()
    source = runner.digest()
    chosen = runner.wanted(options.task or TASKS, options.types)
    if options.third:
        chosen = [each for each in runner.third() if each in chosen]
    rows = runner.kept(options.cache)
    done = {
        each
        for each, (digest, row) in rows.items()
        if digest == source or options.keep_all or (options.keep_whole and not row.failures)
    }
    todo = [each for each in chosen if each not in done]
    for number, (row, seconds) in enumerate(
        runner.run(todo, options.jobs, seconds=options.seconds, without=options.without), 1
    ):
        runner.keep(options.cache, row, source, seconds)
        rows[row.task, row.model_type] = source, row
        said = "; ".join(f"{name}: {why}" for name, why in row.failures.items()) or "whole"
        print(f"{number}/{len(todo)} {row.task} {row.model_type} {seconds:.0f} s: {said}", flush=True)
    found = [rows[each][1] for each in chosen]
    print(f"{len(found)} types, {sum(row.whole for row in found)} whole")
    if not (options.types or options.task or options.third or options.without):
        runner.PAGE.write_text(table.document(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
