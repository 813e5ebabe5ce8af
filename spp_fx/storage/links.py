"""Which symbolic links of a folder are followed: into its own tree, into its Hugging Face cache, anywhere if allowed.

The permission to follow the others (`--allow-links`, `allow_links=True`) holds for a whole verb and everything
that it calls, on whatever thread: it is a context variable, set by `links_allowed` and `links_option` alone and
read by `check_link` alone.
"""

import functools
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import ParamSpec, TypeVar

from spp_fx.errors import FormatError

Asked = ParamSpec("Asked")
Given = TypeVar("Given")

_allowed: ContextVar[bool] = ContextVar("spp_fx_links_allowed", default=False)

_REPOSITORY = re.compile(r"[a-z]+s--.+")  # models--ORG--NAME, datasets--...
_DIGEST = re.compile(r"[0-9a-f]{64}")


@contextmanager
def links_allowed(allow: bool = True) -> Generator[None, None, None]:
    """Within the block, links to anywhere are followed; with `allow` false, as it was before the block."""
    before = _allowed.set(allow or _allowed.get())
    try:
        yield
    finally:
        _allowed.reset(before)


def links_option(verb: Callable[Asked, Given]) -> Callable[Asked, Given]:
    """For a verb with a keyword argument `allow_links`: true follows the links of its folders to anywhere."""

    @functools.wraps(verb)
    def wrapped(*args: Asked.args, **kwargs: Asked.kwargs) -> Given:
        with links_allowed(bool(kwargs.get("allow_links", False))):
            return verb(*args, **kwargs)

    return wrapped


def check_link(folder: Path, path: Path) -> None:
    """A path in a folder stays where the folder's files may lie, whatever links it goes through.

    These places are the folder's own tree and, where the folder is (in) a snapshot of the Hugging Face cache, or
    holds links into one, that cache: a link may lead to the `blobs` of a repository, to those that several
    repositories share, and to other snapshots. Under `links_allowed` it may lead anywhere.

    Raises:
        FormatError: the link leaves these places, or goes in a circle.
    """
    root, real = resolved(folder), resolved(path)
    if real.is_relative_to(root) or _allowed.get():
        return
    repository = _repository_of(root)
    if repository is not None and any(
        real.is_relative_to(repository / part) for part in ("blobs", "snapshots")
    ):
        return
    cache = _cache_of(real)
    if cache is not None and cache == (_cache_of(root) or _cache_linked_to(folder, root)):
        return
    raise FormatError(
        f"{path}: is a symbolic link to {real}, outside of the folder and of its Hugging Face cache; put the file "
        "itself there, or allow it with --allow-links (in Python: allow_links=True)"
    )


def resolved(path: Path) -> Path:
    """The path that is behind all links; FormatError if they go in a circle."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a name that none can have
        raise FormatError(f"{path}: cannot be followed to a file ({error})") from error


def _repository_of(real: Path) -> Path | None:
    """The repository whose `snapshots` a path lies in."""
    return next((each.parent for each in real.parents if each.name == "snapshots"), None)


def _cache_of(real: Path) -> Path | None:
    """The Hugging Face cache that a path lies in, by its place: CACHE/models--A--B/blobs/..., CACHE/blobs/ab/ab..."""
    parts = real.parts
    for place in range(len(parts) - 1):
        if _REPOSITORY.fullmatch(parts[place]) and parts[place + 1] in ("blobs", "snapshots"):
            return Path(*parts[:place])
    if (
        len(parts) > 3
        and parts[-3] == "blobs"
        and _DIGEST.fullmatch(parts[-1])
        and parts[-1][:2] == parts[-2]
    ):
        return Path(*parts[:-3])
    return None


def _cache_linked_to(folder: Path, root: Path) -> Path | None:
    """The cache that the links in a folder lead to: of the first by name that leaves the folder for one."""
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink() and not (real := resolved(entry)).is_relative_to(root):
            cache = _cache_of(real)
            if cache is not None:
                return cache
    return None
