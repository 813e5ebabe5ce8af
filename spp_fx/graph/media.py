"""Pictures and recordings in files."""

from pathlib import Path
from typing import Any

import numpy as np

from spp_fx.errors import UsageError, unreadable


def read_image(path: Any) -> Any:
    """A picture in RGB, as Pillow has it.

    Raises:
        UsageError: it cannot be read, or Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise UsageError("pictures need Pillow; install it with: pip install 'spp-fx[media]'") from error
    if isinstance(path, Image.Image):  # data sets of the hub decode it
        return path.convert("RGB")
    try:
        with Image.open(Path(path)) as image:
            return image.convert("RGB")
    except OSError as error:
        raise UsageError(f"{path}: {unreadable(error) if error.strerror else error}") from error


def read_sound(path: Any, rate: int) -> Any:
    """A recording as samples (n,) float32 of numpy, its channels mixed.

    Args:
        rate: samples a second that the model takes.

    Raises:
        UsageError: it cannot be read, has another rate, or soundfile is not installed.
    """
    if isinstance(path, dict) and "array" in path:  # data sets of the hub decode it
        samples, own, path = (
            np.asarray(path["array"], np.float32),
            int(path["sampling_rate"]),
            path.get("path"),
        )
    else:
        try:
            import soundfile
        except ImportError as error:
            raise UsageError(
                "recordings need soundfile; install it with: pip install 'spp-fx[media]'"
            ) from error
        try:
            samples, own = soundfile.read(str(path), dtype="float32")
        except (OSError, RuntimeError) as error:
            raise UsageError(f"{path}: cannot be read as a recording: {error}") from error
    if own != rate:
        raise UsageError(f"{path}: has {own} samples a second, the model takes {rate}; resample it first")
    return samples.mean(-1) if samples.ndim > 1 else samples
