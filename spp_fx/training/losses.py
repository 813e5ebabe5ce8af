"""What training minimises: the loss of a text, of a teacher's predictions, and of its hidden states."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import kl_div

from spp_fx.errors import UsageError
from spp_fx.graph.program import Program

LOSS = "loss"
PARTS = ("text", "teacher", "hidden")
"""The parts of the loss, in the order of the formula of `Objective`."""
EPSILON = 1e-6
"""Added to the mean square of a teacher's hidden states, which may be zero."""


@dataclass(frozen=True)
class Objective:
    """(1 - teacher_weight) * text + teacher_weight * teacher + match_hidden * hidden.

    Every part is a mean over the tokens of an optimizer step, whatever batches and processes these are split into.

    Attributes:
        teacher_weight: 0 to 1; 0 learns the text alone, 1 the teacher alone.
        temperature: of teacher and student in their divergence, which is multiplied by its square.
        match_hidden: weight of the distance of the hidden states; 0: they are not compared.
    """

    teacher_weight: float = 1.0
    temperature: float = 1.0
    match_hidden: float = 0.0


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    count: Tensor | int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Mean over predicted tokens of T^2 KL(teacher || student), in nats; Hinton et al., 2015.

    Args:
        student: logits (batch, sequence, vocabulary).
        teacher: logits of the same shape.
        labels: (batch, sequence) int64; a position counts if the token after it is not -100.
        count: what the sum is divided by, where a step has more batches than this; None: its own tokens.
        temperature: T, what both logits are divided by; T^2 keeps the size of the gradients.
    """
    learned = labels[:, 1:].flatten() != -100
    ours, theirs = (
        _tempered(logits[:, :-1].flatten(0, 1)[learned], temperature).log_softmax(-1)
        for logits in (student, teacher)
    )
    total = kl_div(ours, theirs, log_target=True, reduction="sum") * temperature**2
    return total / (len(ours) if count is None else count)


def sampled_loss(
    student: Tensor,
    draws: Tensor,
    counts: Tensor,
    entropy: Tensor,
    count: Tensor | int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """As `distillation_loss`, estimated from tokens drawn from the teacher; its gradient is unbiased.

    The cross entropy of the drawn tokens minus the teacher's own entropy. Single estimates may be below zero.

    Args:
        student: logits (batch, sequence, vocabulary).
        draws: (batch, sequence, most) int64, different tokens of each position.
        counts: of the same shape, how often each was drawn; all zero where nothing is learned.
        entropy: (batch, sequence) of the teacher at this temperature, in nats.
        count: as for `distillation_loss`.
    """
    learned = counts.sum(-1) > 0
    ours = _tempered(student[learned], temperature).log_softmax(-1)
    shares = counts[learned].float()
    shares = shares / shares.sum(-1, keepdim=True)
    cross = -(ours.gather(-1, draws[learned]) * shares).sum(-1)
    total = (cross - entropy[learned]).sum() * temperature**2
    return total / (len(ours) if count is None else count)


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    return logits.float() if temperature == 1 else logits.float() / temperature


@dataclass(frozen=True)
class Layers:
    """The decoder layers of a program, in order, and which of its outputs is the hidden state of each.

    Attributes:
        modules: one for each layer.
        outputs: the index of the hidden state among a layer's outputs; None where it is the only one.
        width: of the hidden states.
    """

    modules: tuple[nn.Module, ...]
    outputs: tuple[int | None, ...]
    width: int

    @classmethod
    def of(cls, program: Program) -> "Layers":
        """The layers of a program that `partition` has passed.

        Raises:
            UsageError: a layer's hidden state cannot be told from its other outputs.
        """
        width = getattr(program.config.get_text_config(decoder=True), "hidden_size", None)
        if not isinstance(width, int):
            raise UsageError(
                "--match-hidden needs hidden_size in config.json, to tell hidden states from other values"
            )
        modules = [program.get_submodule(path) for path in program.units]
        outputs = [
            _hidden_output(each, path, width) for each, path in zip(modules, program.units, strict=True)
        ]
        return cls(tuple(modules), tuple(outputs), width)

    @contextmanager
    def states(self) -> Generator[list[Tensor], None, None]:
        """A list of the layers' hidden states (batch, sequence, width) of the one forward within the block.

        A layer that runs again in backward, for gradient checkpointing, does so after the block and adds nothing.
        """
        found: list[Tensor] = []

        def keep(module: nn.Module, arguments: Any, output: Any, index: int | None) -> None:
            found.append(output if index is None else output[index])

        handles = [
            module.register_forward_hook(partial(keep, index=index))
            for module, index in zip(self.modules, self.outputs, strict=True)
        ]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()


def _hidden_output(module: nn.Module, path: str, width: int) -> int | None:
    """A layer may give other values to later ones, too: sizes, or keys that several layers share."""
    assert isinstance(module, fx.GraphModule)  # partition has checked it
    (given,) = next(node for node in module.graph.nodes if node.op == "output").args
    if isinstance(given, fx.Node):
        return None
    found = [index for index, node in enumerate(given) if _is_hidden(node, width)]
    if len(found) != 1:
        raise UsageError(
            f"--match-hidden: {path} has {len(found)} outputs that may be its hidden state; train without it"
        )
    return found[0]


def _is_hidden(node: Any, width: int) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.ndim == 3
        and value.shape[-1] == width
    )


def squares(states: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Sum of squares of each layer's hidden states over the tokens of a mask, (layers,) float64.

    Args:
        states: (batch, sequence, width) each.
        mask: (batch, sequence), not zero where there is a token.
    """
    seen = mask.bool()
    return torch.stack([each[seen].double().square().sum() for each in states])


def hidden_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor, count: Tensor, sums: Tensor
) -> Tensor:
    """Sum over layers of mean((S - T)^2) / (mean(T^2) + epsilon); SquareHead of Kurtic et al., 2023.

    Both means are over the tokens of the optimizer step of which these are a part, so that the losses of its
    parts add up to that of the whole.

    Args:
        student, teacher: hidden states after each layer, (batch, sequence, width) each.
        mask: (batch, sequence), not zero where there is a token; padding does not count, prompts do.
        count: tokens of the step.
        sums: `squares` of the teacher over the step, (layers,).
    """
    seen, total = mask.bool(), torch.zeros((), device=mask.device)
    for ours, theirs, square in zip(student, teacher, sums, strict=True):
        numbers = count * ours.shape[-1]
        distance = (ours[seen].float() - theirs[seen].float()).square().sum()
        total = total + distance / (numbers * (square / numbers + EPSILON)).float()
    return total
