"""A list of files that are finished, one line of JSON each, that a crash can cut short but not falsify."""

import json
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from spp_fx.checkpoint.disk import fsync_folder


@dataclass(frozen=True)
class Entry:
    """A file that is durable.

    Attributes:
        size: of the file in bytes; of a part, how many of its first bytes are durable.
        facts: what its writer wants to know of it when it goes on.
        part: the file is still being written.
    """

    size: int
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    part: bool = False


class Journal:
    """The journal of one folder. A later line on a file takes the place of an earlier one.

    Attributes:
        entries: by the file's path in the folder.
        mark: the last mark that was set: a number whose meaning is the caller's.
    """

    def __init__(self, path: Path) -> None:
        """Read what is there; a line that was cut off by a crash, and what follows it, is dropped."""
        self.entries: dict[str, Entry] = {}
        self.mark: int | None = None
        self._append = threading.Lock()
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o666)
        try:
            self._read(path.read_bytes())
            fsync_folder(path.parent)
        except BaseException:
            self.close()
            raise

    def _read(self, content: bytes) -> None:
        whole = 0
        for line in content.splitlines(keepends=True):
            if not line.endswith(b"\n") or not self._take(line):
                break
            whole += len(line)
        if whole < len(content):
            os.ftruncate(self._descriptor, whole)

    def close(self) -> None:
        os.close(self._descriptor)

    def enter(self, name: str, entry: Entry) -> None:
        """Say that a file is durable. Thread-safe; on the disk when it returns."""
        content = {"file": name, "size": entry.size, "part": entry.part, "facts": entry.facts}
        self._write(content)

    def set_mark(self, mark: int) -> None:
        """Write a mark. On the disk when it returns."""
        self._write({"mark": mark})

    def _write(self, content: dict[str, Any]) -> None:
        line = json.dumps(content).encode() + b"\n"
        with self._append:
            start = os.fstat(self._descriptor).st_size
            try:
                done = 0
                while done < len(line):
                    done += os.write(self._descriptor, line[done:])
                os.fsync(self._descriptor)
            except BaseException:
                os.ftruncate(self._descriptor, start)
                raise
            self._take(line)

    def _take(self, line: bytes) -> bool:
        try:
            content = json.loads(line)
        except ValueError:
            return False
        match content:
            case {"file": str(name), "size": int(size), "part": bool(part), "facts": dict(facts)}:
                self.entries[name] = Entry(size, cast("dict[str, Any]", facts), part)
            case {"mark": int(mark)}:
                self.mark = mark
            case _:
                return False
        return True
