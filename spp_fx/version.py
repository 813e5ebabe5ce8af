"""The version of this package, and how those of others are read."""

VERSION = "0.1.0"


def release(version: str) -> tuple[int, int]:
    """The first two numbers of a version such as torch's "2.13.0+cpu"."""
    major, minor, *_ = version.split(".")
    return int(major), int(minor)
