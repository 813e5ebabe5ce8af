"""Models by folder, or by hub id where there is a network."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from spp_fx.errors import UsageError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.md")


def resolve_model(name: str) -> Path:
    """A model's folder: the path itself if it is there, else the hub's model of that id.

    Raises:
        UsageError: it is neither.
    """
    path = Path(name)
    if path.exists():
        return path
    if not HUB_ID.fullmatch(name):
        raise UsageError(f"{name}: there is no such folder")
    try:
        return Path(snapshot_download(name, allow_patterns=list(WANTED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UsageError(
            f"{name}: there is no such folder, and as a hub id it cannot be had: {said}"
        ) from error
