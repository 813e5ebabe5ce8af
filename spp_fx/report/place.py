"""Where a finding is, in the words of tools that show files of a repository."""

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from spp_fx.report.verdict import SiteVerdict, Verified


@dataclass(frozen=True)
class Root:
    """The folder that paths in reports are relative to."""

    path: Path

    @classmethod
    def current(cls) -> "Root":
        """The checkout of a GitHub workflow, the current folder elsewhere."""
        return cls(Path(os.environ.get("GITHUB_WORKSPACE") or Path.cwd()).resolve())

    def relative(self, path: Path) -> str | None:
        """A path below the root with '/' between its parts, None for one outside."""
        absolute = Path(os.path.abspath(path))
        for form in (absolute, absolute.resolve()):
            if form.is_relative_to(self.path):
                return form.relative_to(self.path).as_posix()
        return None

    def shown(self, path: Path) -> str:
        """As `relative`; the absolute path for one outside."""
        return self.relative(path) or Path(os.path.abspath(path)).as_posix()

    def uri(self, path: Path) -> str:
        """As `relative`, as a URI reference; a file URI for one outside."""
        inside = self.relative(path)
        return (
            quote(os.fsencode(inside), safe="/")
            if inside is not None
            else Path(os.path.abspath(path)).as_uri()
        )


def file_of(verdict: Verified, site: SiteVerdict | None) -> Path:
    """The file that holds a site where it is known to lie in the artifact, else the artifact itself."""
    if site is None or not site.file or not verdict.path.is_dir():
        return verdict.path
    file = verdict.path / site.file
    return file if file.is_file() else verdict.path
