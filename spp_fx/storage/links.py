"""Symbolic links in a folder: followed within it and its Hugging Face cache, elsewhere only with --allow-links.

`links_allowed` sets the permission for a verb and everything that it calls, on any thread; only `check_link` reads it.
"""

import functools
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from pathlib import Path
from typing import ParamSpec, TypeVar

from spp_fx.errors import FormatError

Args = ParamSpec("Args")
Result = TypeVar("Result")

_allowed: ContextVar[bool] = ContextVar("spp_fx_links_allowed", default=False)

_REPOSITORY = re.compile(r"[a-z]+s--.+")  # models--ORG--NAME, datasets--...
_DIGEST = re.compile(r"[0-9a-f]{64}")


@contextmanager
def links_allowed(allow: bool = True) -> Generator[None, None, None]:
    """Follow links to anywhere within the block; with `allow` false, nothing changes."""
    before = _allowed.set(allow or _allowed.get())
    try:
        yield
    finally:
        _allowed.reset(before)


def links_option(verb: Callable[Args, Result]) -> Callable[Args, Result]:
    """Give a verb with a keyword argument `allow_links` its meaning: run it under `links_allowed`."""

    @functools.wraps(verb)
    def wrapped(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        with links_allowed(bool(kwargs.get("allow_links", False))):
            return verb(*args, **kwargs)

    return wrapped


def check_link(folder: Path, path: Path) -> None:
    """Check where a path in a folder leads through symbolic links.

    It may lead into the folder's own tree. Where the folder is in a snapshot of the Hugging Face cache, or holds
    links into one, it may lead into that cache: to the `blobs` of a repository, to blobs that repositories share,
    and to other snapshots. Under `links_allowed` it may lead anywhere.

    Raises:
        FormatError: the link leads elsewhere, or in a circle.
    """
    root, real = resolved(folder), resolved(path)
    if real.is_relative_to(root) or _allowed.get():
        return
    repository = next((parent.parent for parent in root.parents if parent.name == "snapshots"), None)
    if repository is not None and any(
        real.is_relative_to(repository / part) for part in ("blobs", "snapshots")
    ):
        return
    cache = _cache_of(real)
    if cache is not None and cache == (_cache_of(root) or _cache_linked_from(folder, root)):
        return
    raise FormatError(
        f"{path}: is a symbolic link to {real}, outside of the folder and of its Hugging Face cache; put the file "
        "itself there, or allow it with --allow-links (in Python: allow_links=True)"
    )


def resolved(path: Path) -> Path:
    """The path behind all links; FormatError if they go in a circle."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a circle, or a name that no file can have
        raise FormatError(f"{path}: cannot be followed to a file ({error})") from error


def _cache_of(real: Path) -> Path | None:
    """The Hugging Face cache around CACHE/models--A--B/blobs/..., .../snapshots/... or CACHE/blobs/ab/ab..."""
    parts = real.parts
    for index, (part, below) in enumerate(pairwise(parts)):
        if _REPOSITORY.fullmatch(part) and below in ("blobs", "snapshots"):
            return Path(*parts[:index])
    if len(parts) > 3:
        *cache, blobs, prefix, name = parts
        if blobs == "blobs" and _DIGEST.fullmatch(name) and name[:2] == prefix:
            return Path(*cache)
    return None


def _cache_linked_from(folder: Path, root: Path) -> Path | None:
    """The cache that the first link, by name, from a folder to a cache leads to."""
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink() and not (real := resolved(entry)).is_relative_to(root):
            cache = _cache_of(real)
            if cache is not None:
                return cache
    return None
