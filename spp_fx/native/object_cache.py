"""Object files of earlier runs. What is loaded from here is executed, so whoever could have written it counts.

A file holds the SHA-256 of key and code, then the code. One that is damaged, belongs to another key, to
another user than this one or root, or that others may write, is as good as missing. Where the system tells
no owners (Windows), there is no cache.
"""

import hashlib
import os
import stat
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import cache_from_source
from pathlib import Path

_DIGEST_BYTES = 32
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def folders(source: Path) -> list[Path]:
    """Where object files of a Python module may lie: with its byte code, then in the user's cache folder."""
    if not hasattr(os, "geteuid"):
        return []
    found = [Path(cache_from_source(source)).parent]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if cache.is_absolute():  # a relative one is to be ignored, says the XDG specification
        found.append(cache / "spp-fx")
    return found


def load(folders: Sequence[Path], name: str, key: str) -> bytes | None:
    """The code stored as `name` under `key` in the first folder that has it whole and from a trusted hand."""
    for folder in folders:
        content = _read_trusted(folder / name)
        if content is None:
            continue
        digest, code = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if code and digest == _digest(key, code):
            return code
    return None


def store(folders: Sequence[Path], name: str, key: str, code: bytes) -> None:
    """Put the code into the first folder that can be written; none is no error, the next run compiles again."""
    for folder in folders:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / name, _digest(key, code) + code)
            return


def _digest(key: str, code: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\0" + code).digest()


def _read_trusted(path: Path) -> bytes | None:
    # No link is followed, and no pipe waited for.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        with open(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            return file.read() if _trusted(status) else None
    except OSError:
        return None


def _trusted(status: os.stat_result) -> bool:
    ours = status.st_uid in (os.geteuid(), 0)
    return stat.S_ISREG(status.st_mode) and ours and not status.st_mode & _OTHERS_WRITE


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, and never through a link: a new file takes the name."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
    try:
        with open(handle, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
