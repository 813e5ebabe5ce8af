"""Trials: kill a command some times, look at what is there after each kill, let it end, compare."""

import os
import random
import shutil
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from tests.command import listing
from tests.soak.jobs import Job
from tests.soak.run import Ended, run_counted, run_forked, run_python


@dataclass
class Tally:
    """What trials of one command saw.

    Attributes:
        kills: runs that were killed, by what the kill found.
        broken: what should never be, each with the kill that it came after.
    """

    name: str
    kills: Counter[str] = field(default_factory=Counter[str])
    finished: int = 0
    broken: list[str] = field(default_factory=list[str])
    undisturbed_s: float = 0.0
    calls: int = 0

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "kills": sum(self.kills.values()), "found": dict(self.kills)}


@dataclass(frozen=True)
class Trials:
    """Trials of one command.

    Attributes:
        expected: the files of an undisturbed run, with their digests.
        work: seconds that it works.
        whole: seconds that it takes as `python -m spp_fx`, None where no run is started so.
        timed: some are killed after a time; without, all are at a call, the same one on every machine.
    """

    job: Job
    folder: Path
    server: ForkServerContext
    expected: dict[str, str]
    work: float
    whole: float | None
    tally: Tally
    timed: bool = True

    @classmethod
    def of(
        cls, job: Job, folder: Path, server: ForkServerContext, *, python: bool = False, timed: bool = True
    ) -> "Trials":
        """Measure an undisturbed run of a command."""
        folder.mkdir(parents=True)
        tally = Tally(job.name)
        out, store = folder / "undisturbed", folder / ".undisturbed.work"
        ended, tally.calls = run_counted(server, job.to(out), store)
        assert ended.code == 0, f"{job.name}: exit {ended.code}"
        expected = listing(out)
        shutil.rmtree(out)
        whole = None
        if python:
            real = run_python(job.to(out), store)
            assert real.code == 0
            assert listing(out) == expected
            whole = real.seconds
            shutil.rmtree(out)
        tally.undisturbed_s = round(ended.seconds, 3)
        return cls(job, folder, server, expected, ended.seconds, whole, tally, timed)

    def until(self, kills: int, random_: random.Random) -> Tally:
        """Trials until so many runs were killed."""
        while sum(self.tally.kills.values()) < kills and not self.tally.broken:
            self.trial(random_, kills - sum(self.tally.kills.values()))
        return self.tally

    def trial(self, random_: random.Random, most: int) -> None:
        """Kill the command once or some times, then let it end."""
        out = self.folder / "out"
        if self.job.replaces:
            shutil.copytree(self.job.replaces, out)
        for number in range(min(most, random_.choice((1, 1, 2, 3)))):
            ended, how = self._kill(random_)
            if not ended.killed:
                break  # it was done before its time
            self.tally.kills[self._found(out)] += 1
            self._look(out, f"{how}, kill {number + 1} in a row")
        if self.job.replaces or not out.exists():
            ended = run_forked(self.server, self.job.to(out), self._store)
            if ended.code != 0:
                self.tally.broken.append(f"exit {ended.code} of the last run")
        elif run_forked(self.server, self.job.to(out), self._store).code != 2:
            self.tally.broken.append("a finished output was not refused")
        self._look(out, "the end")
        if left := sorted(set(os.listdir(self.folder)) - {"out"}):
            self.tally.broken.append(f"left behind: {', '.join(left)}")
        if not out.exists():
            self.tally.broken.append("no output at the end")
        elif listing(out) != self.expected:
            self.tally.broken.append("the output at the end is not the undisturbed one")
        self.tally.finished += 1
        self._clear()

    def _kill(self, random_: random.Random) -> tuple[Ended, str]:
        words = self.job.to(self.folder / "out")
        if self.whole is not None:
            after = random_.uniform(0, self.whole)
            return run_python(words, self._store, after), f"after {after:.3f} s of python"
        if self.timed and random_.random() < 0.5:
            after = random_.uniform(0, self.work)
            return run_forked(self.server, words, self._store, after), f"after {after:.3f} s of work"
        # Half of them among the last calls, where names are given and things removed.
        first = 1 if random_.random() < 0.5 else max(1, self.tally.calls - 60)
        call = random_.randint(first, self.tally.calls)
        return run_forked(self.server, words, self._store, at_call=call), f"at call {call}"

    @property
    def _store(self) -> Path:
        return self.folder / ".out.work"

    def _found(self, out: Path) -> str:
        if out.exists() and not self._is_old(out):
            return "output in place"
        journal = self._store / "journal.jsonl"
        kept = journal.is_file() and b'{"file"' in journal.read_bytes()
        return "some files finished" if kept else "no file finished"

    def _look(self, out: Path, when: str) -> None:
        if self.job.replaces and not out.exists():
            self.tally.broken.append(f"{when}: neither the old output nor the new one is there")
        if out.exists() and listing(out) != self.expected and not self._is_old(out):
            odd = sorted(set(listing(out).items()) ^ set(self.expected.items()))[:3]
            self.tally.broken.append(f"{when}: the output is not the undisturbed one: {odd}")

    def _is_old(self, out: Path) -> bool:
        """Whether the output is still the one that is to be replaced, whole."""
        return self.job.replaces is not None and listing(out) == listing(self.job.replaces)

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            shutil.rmtree(path)
