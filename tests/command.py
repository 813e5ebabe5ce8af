"""The command line, run in this process."""

import json
from dataclasses import dataclass
from typing import Any

import pytest

from spp_fx.cli import run


@dataclass(frozen=True)
class Ran:
    """What a command line did."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


def spp_fx(capfd: pytest.CaptureFixture[str], *arguments: object) -> Ran:
    """Run `spp-fx ARGUMENTS` and take what it printed."""
    capfd.readouterr()
    code = run([str(argument) for argument in arguments])
    captured = capfd.readouterr()
    return Ran(code, captured.out, captured.err)
