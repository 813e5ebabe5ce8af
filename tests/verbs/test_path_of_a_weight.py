"""docs/architecture.md: a weight goes down through the files once and comes up once."""

import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from spp_fx.verbs.merge import merge
from spp_fx.verbs.verify import verify

PACKAGE = Path(__file__).parents[2] / "spp_fx"
AROUND = ("options.py", "parallel.py", "storage/links.py", "storage/strict_json.py")
"""They run what they are given: the check of an option, a function over threads, a verb, a file's validators."""


@contextmanager
def calls() -> Generator[set[tuple[tuple[str, ...], str, str]], None, None]:
    """Every call from one file of the package into another: the files above it, the file, the function."""
    found: set[tuple[tuple[str, ...], str, str]] = set()
    threads = threading.local()

    def profile(frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event not in ("call", "return") or not path.is_relative_to(PACKAGE):
            return
        name = path.relative_to(PACKAGE).as_posix()
        stack: list[str] = threads.__dict__.setdefault("stack", [])
        if event == "return":
            if stack:  # the frame that switched profiling on returns without having been called
                stack.pop()
            return
        if name not in AROUND and stack and stack[-1] != name:
            above = tuple(dict.fromkeys(file for file in stack if file not in AROUND))
            found.add((above, name, frame.f_code.co_name))
        stack.append(name)

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        yield found
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def climbs(work: Callable[[], object], handed_down: set[str]) -> list[tuple[tuple[str, ...], str, str]]:
    """The calls back into a file that is on the way already, but for functions that were handed down."""
    work()  # whatever is imported on first use is imported by now
    with calls() as found:
        work()
    assert found
    return [
        (above, name, function)
        for above, name, function in sorted(found)
        if name in above[:-1] and function not in handed_down
    ]


def test_verify_goes_down_once_and_comes_up_once(world):
    assert climbs(lambda: verify(world / "sparse", jobs=1), set()) == []


def test_merge_goes_down_once_and_comes_up_once(world):
    """The writer asks the plan for the spans that change, and has them folded."""
    handed_down = {"changes", "_matrix", "_fold"}

    def work() -> None:
        merge(world / "adapter", world / "new", force=True)

    assert climbs(work, handed_down) == []
