"""Hugging Face's Trainer over a program: only factors are trained and saved; progress; teachers."""

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from spp_fx.adapters.adapter_folder import FACTORS, whole_checkpoints
from spp_fx.errors import FormatError
from spp_fx.graph.program import Program, factor_attribute
from spp_fx.graph.task import CAUSAL_LM
from spp_fx.training.losses import (
    LOSS,
    PARTS,
    Layers,
    Objective,
    distillation_loss,
    hidden_loss,
    sampled_loss,
    squares,
)
from spp_fx.training.samples import Windows
from spp_fx.training.state import (
    LOSSES,
    OPTIMIZER,
    RANDOM,
    RECORD,
    checkpoint_step,
    has_losses,
    load_state,
    random_state,
    save_state,
    set_random_state,
)
from spp_fx.training.task_rows import HiddenRows


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


MASK = "attention_mask"
DRAWN = ("draws", "counts", "entropy")
"""What rows of `teacher_cache.TaughtRows` have beside the inputs."""


class Predicted(NamedTuple):
    """What a teacher says of one batch: its outputs, and the hidden states that are asked for."""

    outputs: Any
    states: list[Tensor]


class Reference(NamedTuple):
    """Of an optimizer step over all processes: its tokens, and the teacher's sums of squares, layer by layer."""

    tokens: Tensor
    sums: Tensor


def undecayed(program: Program) -> set[str]:
    """What is trained without weight decay, since zero is not where it rests: norms and biases, factors from one."""
    found = set(program.trained)
    for site, method in program.adapters.items():
        owner, _, parameter = site.rpartition(".")
        specs = method.factors(program.sites[site].shape)
        found |= {f"{owner}.{factor_attribute(parameter, key)}" for key, spec in specs.items() if spec.ones}
    return found


class AdapterTrainer(Trainer):
    """Trainer whose checkpoints hold the factors, and optimizer, schedule and generators without pickle.

    Args:
        factors: the trainable parameters, under the names that the adapter folder gives them.
        teacher: a program to learn from; None learns from what the rows have, labels and perhaps `DRAWN`.
        objective: how the loss is made up where there is a teacher or what was drawn from one.
        record: what the run was asked for; kept with every checkpoint as `RECORD`.
    """

    def __init__(
        self,
        *,
        model: Program,
        factors: dict[str, nn.Parameter],
        teacher: Program | None = None,
        objective: Objective | None = None,
        record: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.factors = factors
        self.task = model.task
        self.names = [entry.name for entry in model.inputs]
        self.record = record or {}
        self.undecayed = undecayed(model)
        self.objective = objective = objective or Objective()
        self.taught: Predicted | None = None
        self.reference: Reference | None = None
        self.sums: dict[str, Tensor] = {}
        self.first_step = 0
        super().__init__(model=model, **kwargs)
        self.can_return_loss = True  # evaluation has a loss of rows without labels, too
        if teacher is not None and not isinstance(teacher, FSDPModule):
            teacher = teacher.to(self.args.device)
        self.teacher = teacher
        matches = teacher is not None and objective.match_hidden > 0
        self.layers = (Layers.of(model), Layers.of(teacher)) if matches and teacher else None

    def get_decay_parameter_names(self, model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
        """All that is trained, without `undecayed`: transformers would also leave out what is called norm or bias."""
        return [name for name, _ in model.named_parameters() if name not in self.undecayed]

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
        drawn = [inputs[key] for key in DRAWN if key in inputs]
        goal, labels, given = self.objective, inputs.get("labels"), self._given(inputs)
        learns = goal.teacher_weight > 0 and bool(drawn or self.teacher)
        if not learns and self.layers is None:
            plain = given | ({} if labels is None else {"labels": labels})
            loss, output = super().compute_loss(model, plain, True, num_items_in_batch)
            self._add(model, {"text": loss, LOSS: loss})
            return (loss, output) if return_outputs else loss
        # Losses are averaged over processes, tokens counted over all of them.
        counted = num_items_in_batch is not None
        scale = self._scale(num_items_in_batch)
        text = {"labels": labels} if goal.teacher_weight < 1 else {}
        if text and counted:
            text["num_items_in_batch"] = num_items_in_batch
        with self._states(0) as states:
            output = model(**given, **text)
        parts: dict[str, Tensor] = {}
        if text:
            parts["text"] = output.loss
        if drawn:
            draws, counts, entropy = drawn
            parts["teacher"] = sampled_loss(
                output.logits, draws, counts, entropy, num_items_in_batch, goal.temperature
            )
        else:
            taught, self.taught = self.taught or self._teach(given), None
            if learns:
                parts["teacher"] = self._divergence(output, taught.outputs, inputs, num_items_in_batch)
            if self.layers is not None:
                if not model.training or self.reference is None:
                    self.reference = self._refer([(taught, given[MASK])], together=scale > 1)
                parts["hidden"] = hidden_loss(states, taught.states, given[MASK], *self.reference)
        weights = {
            "text": 1 - goal.teacher_weight,
            "teacher": goal.teacher_weight,
            "hidden": goal.match_hidden,
        }
        parts = {name: part * scale for name, part in parts.items()}
        loss = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        # The Trainer itself takes the mean over the batches of a step where there are no labels to count.
        batches = 1 if counted else self.args.gradient_accumulation_steps
        self._add(model, {name: part / batches for name, part in (parts | {LOSS: loss}).items()})
        return (loss, output) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.taught = None
        if self.layers is not None and batches:
            # The hidden states are compared relative to those of the whole step, which its first batch needs already:
            # with several batches the teacher runs twice over each.
            with self.compute_loss_context_manager():
                pairs = (self._teach_batch(batch, alone=len(batches) == 1) for batch in batches)
                self.reference = self._refer(pairs, together=self.args.average_tokens_across_devices)
        return batches, count

    def _teach_batch(self, batch: dict[str, Any], alone: bool) -> tuple[Predicted, Tensor]:
        given = self._given(self._prepare_inputs(batch))
        taught = self._teach(given)
        if alone:
            self.taught = taught
        return taught, given[MASK]

    def _given(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The model's inputs in a batch."""
        return {name: batch[name] for name in self.names if name in batch}

    def _teach(self, given: dict[str, Tensor]) -> Predicted:
        assert self.teacher is not None
        with torch.no_grad(), self._states(1) as states:
            return Predicted(self.teacher(**given), states)

    def _divergence(
        self, ours: Any, theirs: Any, batch: dict[str, Any], count: Tensor | int | None
    ) -> Tensor:
        """How far the outputs are from the teacher's; the parts of a step add up to its mean."""
        if self.task.name == CAUSAL_LM:
            return distillation_loss(
                ours.logits, theirs.logits, batch["labels"], count, self.objective.temperature
            )
        distance = self.task.distance(ours, theirs, batch, self.objective.temperature)
        # The Trainer leaves the mean over the batches of a step, and of processes, to a loss that counts items.
        if count is None or not cast(nn.Module, self.model).training:
            return distance
        return distance / self.args.gradient_accumulation_steps / self._scale(count)

    def _scale(self, count: Any) -> int:
        """What a loss that is divided by the items of all processes is multiplied by: it is averaged over them."""
        together = count is not None and self.args.average_tokens_across_devices
        return self.accelerator.num_processes if together else 1

    def _states(self, which: int) -> AbstractContextManager[list[Tensor]]:
        """A list of the hidden states of the student (0) or the teacher (1), empty where they are not compared."""
        return nullcontext([]) if self.layers is None else self.layers[which].states()

    def _refer(self, batches: Iterable[tuple[Predicted, Tensor]], *, together: bool) -> Reference:
        sums = torch.stack(
            [
                torch.cat([mask.sum().view(1).double(), squares(taught.states, mask)])
                for taught, mask in batches
            ]
        ).sum(0)
        if together:
            sums = cast(Tensor, self.accelerator.reduce(sums, "sum"))
        return Reference(sums[0], sums[1:])

    def _add(self, model: nn.Module, parts: Mapping[str, Tensor]) -> None:
        """Sum the training loss and its parts; those of an optimizer step add up to its mean."""
        if not model.training:
            return
        if not self.sums:
            self.first_step = self.state.global_step
        for name, part in parts.items():
            self.sums[name] = self.sums.get(name, 0) + part.detach().float()

    def means(self) -> dict[str, float | None]:
        """The loss and each of `PARTS` as means over all steps and processes; None: not part of the loss.

        Steps before a resumption count, too, if the checkpoint has their sums (`LOSSES`).
        """
        steps, sums = max(1, self.state.global_step - self.first_step), self._sums()
        return {name: float(sums[name]) / steps if name in sums else None for name in (LOSS, *PARTS)}

    def _sums(self) -> dict[str, Tensor]:
        """The sums over the steps as means over the processes."""
        return {
            name: cast(Tensor, self.accelerator.reduce(total, "mean")) for name, total in self.sums.items()
        }

    def held_loss(self) -> float:
        """The loss, as evaluation has it, of rows spread evenly over the training data: as many as two steps take."""
        rows: Any = self.train_dataset
        held = len(rows)
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        count = min(held, 2 * step)
        return self.evaluate(Subset(rows, [index * held // count for index in range(count)]))["eval_loss"]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or cast(str, self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        values = {name: value.detach().cpu().contiguous() for name, value in self.factors.items()}
        save_file(values, folder / FACTORS, {"format": "pt"})
        (folder / RECORD).write_text(json.dumps(self.record, indent=2) + "\n")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        load_factors(self.factors, load_file(folder / FACTORS), folder / FACTORS)
        if has_losses(folder):
            saved = load_state(folder, LOSSES)
            self.first_step = saved["first_step"]
            self.sums = {name: total.to(self.args.device) for name, total in saved["sums"].items()}

    def run(self, checkpoint: Path | None, steps: int) -> float:
        """Train up to so many steps, from a checkpoint on if there is one; returns how many seconds it took.

        A checkpoint that has every step, as after a kill that came too late for its run's end, is taken over as it is.
        An interruption gets a note that says how to go on.
        """
        if checkpoint is not None and checkpoint_step(checkpoint) >= steps:
            self._load_from_checkpoint(str(checkpoint))
            self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            return 0.0
        try:
            done = self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except (KeyboardInterrupt, SystemExit) as error:
            folder = Path(cast(str, self.args.output_dir))
            if whole := whole_checkpoints(folder):
                error.add_note(
                    f"{folder}: its factors are as before, and {whole[-1].name} is kept: the same command with "
                    "--resume continues there, with --force it starts over"
                )
            raise
        return done.metrics["train_runtime"]

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
        sums = self._sums()  # of all processes, each of which comes here
        if self.args.should_save:
            save_state(Path(output_dir), LOSSES, {"first_step": self.first_step, "sums": sums})

    def _load_rng_state(self, checkpoint: str | None) -> None:
        name = f"{RANDOM}_{self.args.process_index}"
        # A process that the interrupted run did not have keeps its own generators.
        if checkpoint is not None and (Path(checkpoint) / f"{name}.json").is_file():
            set_random_state(load_state(Path(checkpoint), name))


class ReportLast(TrainerCallback):
    """Reports the loss of the steps since the last report when training ends, whenever that is."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log |= state.global_step >= state.max_steps


class CutEachEpoch(TrainerCallback):
    """Shifts the training windows at the start of every epoch."""

    def __init__(self, windows: Windows | HiddenRows) -> None:
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
