"""Hugging Face's Trainer over a program: only factors are trained and saved; progress; distillation."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import kl_div
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from spp_fx.adapters.adapter_folder import FACTORS
from spp_fx.errors import FormatError
from spp_fx.graph.program import Program
from spp_fx.training.samples import Windows
from spp_fx.training.state import OPTIMIZER, RANDOM, load_state, random_state, save_state, set_random_state


def distillation_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, count: Tensor | int | None = None
) -> Tensor:
    """Mean over predicted tokens of KL(teacher || student), in nats; Hinton et al., 2015, at temperature 1.

    Args:
        student: logits (batch, sequence, vocabulary).
        teacher: logits of the same shape.
        labels: (batch, sequence) int64; a position counts if the token after it is not -100.
        count: what the sum is divided by, where a step has more batches than this; None: its own tokens.
    """
    learned = labels[:, 1:].flatten() != -100
    ours = student[:, :-1].flatten(0, 1)[learned].float().log_softmax(-1)
    theirs = teacher[:, :-1].flatten(0, 1)[learned].float().log_softmax(-1)
    total = kl_div(ours, theirs, log_target=True, reduction="sum")
    return total / (len(ours) if count is None else count)


class ProgressCallback(TrainerCallback):
    """Calls `update(steps done, steps in all, note)` during training."""

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


def load_factors(factors: Mapping[str, nn.Parameter], values: Mapping[str, Tensor], where: Path) -> None:
    """Copy saved factors into a program's; names and shapes must be the same."""
    if set(values) != set(factors):
        odd = sorted(set(values) ^ set(factors))
        raise FormatError(f"{where}: its factors are not those of this adapter (first: {odd[0]})")
    with torch.no_grad():
        for name, parameter in factors.items():
            if values[name].shape != parameter.shape:
                raise FormatError(
                    f"{where}: {name} has shape {list(values[name].shape)}, expected {list(parameter.shape)}"
                )
            parameter.copy_(values[name])


class AdapterTrainer(Trainer):
    """Trainer whose checkpoints hold the factors, and optimizer, schedule and generators without pickle.

    Args:
        factors: the trainable parameters, under the names that the adapter folder gives them.
        teacher: a program whose distribution is learned instead of the labels; None learns the labels.
    """

    def __init__(
        self,
        *,
        model: Program,
        factors: dict[str, nn.Parameter],
        teacher: Program | None = None,
        **kwargs: Any,
    ) -> None:
        self.factors = factors
        super().__init__(model=model, **kwargs)
        if teacher is not None and not isinstance(teacher, FSDPModule):
            teacher = teacher.to(self.args.device)
        self.teacher = teacher

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        # accelerate skips DistributedDataParallel for a model with any DTensor; of a sharded
        # program only the factors matter, and they are not sharded.
        if training and isinstance(model, FSDPModule):
            model = self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
            return DistributedDataParallel(model, broadcast_buffers=False)
        return super()._wrap_model(model, training, dataloader)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if self.teacher is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        output = model(ids, mask)
        with torch.no_grad():
            taught = self.teacher(ids, mask).logits
        loss = distillation_loss(output.logits, taught, inputs["labels"], num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # Losses are averaged over processes, tokens counted over all of them.
            loss = loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or cast(str, self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        values = {name: value.detach().cpu().contiguous() for name, value in self.factors.items()}
        save_file(values, folder / FACTORS, {"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint) / FACTORS
        load_factors(self.factors, load_file(path), path)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            state = {"optimizer": self.optimizer.state_dict(), "scheduler": self.lr_scheduler.state_dict()}  # type: ignore[union-attr]
            save_state(Path(output_dir), OPTIMIZER, state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = load_state(Path(checkpoint), OPTIMIZER)
        self.optimizer.load_state_dict(state["optimizer"])  # type: ignore[union-attr]
        self.lr_scheduler.load_state_dict(state["scheduler"])  # type: ignore[union-attr]

    def _save_rng_state(self, output_dir: str) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_state(Path(output_dir), f"{RANDOM}_{self.args.process_index}", random_state())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        name = f"{RANDOM}_{self.args.process_index}"
        # A process that the interrupted run did not have keeps its own generators.
        if checkpoint is not None and (Path(checkpoint) / f"{name}.json").is_file():
            set_random_state(load_state(Path(checkpoint), name))


class CutEachEpoch(TrainerCallback):
    """Shifts the training windows at the start of every epoch."""

    def __init__(self, windows: Windows) -> None:
        self.windows = windows

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.windows.cut(int(state.epoch or 0))


class EarlyStop(TrainerCallback):
    """Ends training when the evaluation loss has not improved for a while, and puts the best factors back."""

    def __init__(self, factors: Mapping[str, nn.Parameter], patience: int) -> None:
        self.factors = factors
        self.patience = patience
        self.best = float("inf")
        self.since = 0
        self.kept: dict[str, Tensor] = {}

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        loss = (metrics or {}).get("eval_loss", float("nan"))
        if loss < self.best:
            self.best, self.since = loss, 0
            self.kept = {name: value.detach().clone() for name, value in self.factors.items()}
            return
        self.since += 1
        if self.since >= self.patience:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            for name, value in self.kept.items():
                self.factors[name].copy_(value)
