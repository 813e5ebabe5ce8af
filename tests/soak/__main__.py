"""`python -m tests.soak --kills 100 --seed 0 [--verb merge]`: JSON on stdout, exit 1 on anything broken."""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.command import listing
from tests.soak.jobs import VERBS, jobs_of, make_models
from tests.soak.run import fork_server
from tests.soak.trial import Trials


def soak(root: Path, verbs: list[str], kills: int, seed: int, *, python: bool) -> dict[str, Any]:
    """Kill the commands of each verb so many times, shared out among them."""
    make_models(root)
    inputs, server, tallies = listing(root), fork_server(), list[dict[str, Any]]()
    for verb in verbs:
        jobs = jobs_of(verb, root)
        for number, job in enumerate(jobs):
            share = kills // len(jobs) + (number < kills % len(jobs))
            folder = root.with_name(f"{root.name}-{verb}-{number}")
            tally = Trials.of(job, folder, server, python=python).until(
                share, random.Random(f"{seed} {job.name}")
            )
            tallies.append(tally.to_json())
            print(json.dumps(tallies[-1]), file=sys.stderr, flush=True)
    touched = listing(root) != inputs
    broken = touched or any(tally["broken"] for tally in tallies)
    return {"seed": seed, "ok": not broken, "inputs_untouched": not touched, "commands": tallies}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="of each verb")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verb", choices=VERBS, action="append", help="may be repeated; all by default")
    parser.add_argument("--python", action="store_true", help="start each run as `python -m spp_fx`")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-", dir=options.folder) as folder:
        verbs = options.verb or list(VERBS)
        result = soak(Path(folder) / "models", verbs, options.kills, options.seed, python=options.python)
    print(json.dumps(result, indent=2))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
