"""Where reports may be written: never over what is judged, or what it is held to."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from spp_fx.errors import UsageError


def check_targets(
    reports: Mapping[str, tuple[Path, str]], artifacts: Iterable[Path], files: Mapping[str, Path]
) -> None:
    """Refuse report files that would take the place of something that is read.

    Args:
        reports: by option, the file to write and the suffix that such reports have. In the folder of an artifact
            one is only written under that suffix, which nothing that belongs to an artifact has: the folder may
            be the current one, where reports usually go.
        artifacts: files and folders that are judged or compared with.
        files: other files that are read, by what they are.

    Raises:
        UsageError: names the option and what is in its place.
    """
    written: dict[Path, str] = {}
    for option, (target, suffix) in reports.items():
        for form in _forms(target):
            if (other := written.setdefault(form, option)) != option:
                raise UsageError(f"{option} {target}: is the file of {other} as well; give each its own")
            for what, file in files.items():
                if form in _forms(file):
                    raise UsageError(f"{option} {target}: is the {what}; give another file")
            for artifact in artifacts:
                if form in _forms(artifact) or (target.suffix != suffix and _is_part(form, artifact)):
                    raise UsageError(
                        f"{option} {target}: is or would be a part of the artifact {artifact}; "
                        f"give a file elsewhere, or one that is called *{suffix}"
                    )


def _is_part(report: Path, artifact: Path) -> bool:
    """Whether a file lies in an artifact's folder, or beside a lone file where something is already."""
    if artifact.is_dir():
        return any(report.is_relative_to(form) for form in _forms(artifact))
    return os.path.lexists(report) and any(report.parent == form.parent for form in _forms(artifact))


def _forms(path: Path) -> Sequence[Path]:
    """A path as it is spelt, and with its links followed."""
    return tuple(dict.fromkeys((Path(os.path.abspath(path)), path.resolve())))
