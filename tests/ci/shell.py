"""Running what a CI server would run: a shell in which `spp-fx` is this checkout."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.families import prune_2_4

ROOT = Path(__file__).resolve().parents[2]
SITE = "layers.0.up_proj.weight"


def environment(bin_folder: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables of a job: `spp-fx` and `python` are found in `bin_folder`."""
    bin_folder.mkdir(exist_ok=True)
    scripts = {
        "spp-fx": f"#!{sys.executable}\nfrom spp_fx.cli import main\n\nmain()\n",  # as pip writes it
        "python": f'#!/bin/sh\nexec "{sys.executable}" "$@"\n',
    }
    for name, text in scripts.items():
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    kept = {key: os.environ[key] for key in ("HOME", "LANG", "TMPDIR") if key in os.environ}
    return {
        **kept,
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        **(extra or {}),
    }


def shell(script: str, folder: Path, variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a script as GitHub runs a step of `shell: bash`, in a folder."""
    words = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", script]
    return subprocess.run(
        words, cwd=folder, env=dict(variables), capture_output=True, text=True, timeout=600, check=False
    )


def sparse_file(path: Path) -> Path:
    """A .safetensors file with one 2:4 matrix."""
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    prune_2_4(weight)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({SITE: weight}, path)
    return path


def break_file(path: Path) -> None:
    """Make one zero of the file's matrix a one: row 3, the first zero."""
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    prune_2_4(weight)
    column = int((weight[3] == 0).nonzero()[0])
    weight[3, column] = 1.0
    save_file({SITE: weight}, path)
