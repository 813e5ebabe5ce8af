"""`python -m tests.fuzz --cases 10000`: mutated inputs, counted as JSON; exit 1 on any crash, hang or false ok."""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz import runner, seeds


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="how many, from --first on")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--case", type=int, help="this one alone, in this process, with its trace")
    parser.add_argument("--seed", type=int, default=0, help="another stream of cases")
    parser.add_argument(
        "--kind", action="append", default=[], help="only artifacts of this kind (changes numbers)"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--show", type=int, default=50, help="failures to print")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(prefix="spp-fx-seeds-") as folder:
        runner._quiet()
        chosen = runner.only(options.kind, seeds.build(Path(folder) / "seeds"))
        start = time.monotonic()
        numbers = range(options.first, options.first + options.cases)
        if options.case is not None:
            numbers = [options.case]
        report = runner.run(chosen, numbers, options.seed, 1 if options.case is not None else options.jobs)
        result = report.to_json(options.show) | {
            "seed": options.seed,
            "seconds": round(time.monotonic() - start, 1),
        }
        if options.case is not None:
            result["outcome"] = report.outcomes[0]
    print(json.dumps(result, indent=2))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
