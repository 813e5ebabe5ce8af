"""Steps, loss and speed of a training run, for whoever shows them."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class ProgressCallback(TrainerCallback):
    """Calls `update(steps done, steps in all, note)` as training goes on."""

    def __init__(self, update: Callable[[int, int, str], None]) -> None:
        self.update = update
        self.note = ""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.update(state.global_step, state.max_steps, self.note)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if logs and "loss" in logs:
            self.note = f"loss {float(logs['loss']):.3f}"
            self.update(state.global_step, state.max_steps, self.note)
