"""What a benchmark found, as JSON on stdout and, if that is asked for, in a file."""

import json
from pathlib import Path
from typing import Any


def publish(report: dict[str, Any], output: Path | None) -> None:
    """Print a report, and write it to `output`."""
    text = json.dumps(report, indent=1)
    print(text)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n")
