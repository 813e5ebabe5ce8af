"""Tasks: the class that a model is loaded as, the inputs and outputs of its graph, and its loss."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, kl_div, mse_loss
from torch.nn.functional import cross_entropy as cross_entropy_of
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.models.auto import modeling_auto

from spp_fx.errors import UsageError
from spp_fx.registry import Registry, naming

BATCH, LENGTH, TARGET, FRAMES = "batch", "length", "target", "frames"
"""Names of axes: rows, tokens, tokens that a decoder has beside those of its encoder, and frames of a recording."""
TEXT_INPUTS = frozenset(("input_ids", "attention_mask", "token_type_ids"))
"""Names of inputs that a tokenizer makes."""
EXAMPLE: dict[str, int] = {BATCH: 2, LENGTH: 7, TARGET: 5, FRAMES: 400}
"""The sizes that an export runs with: none is 1, which is taken for a constant, and they differ, since equal ones
are taken for one."""


class TaskModel(Protocol):
    """What a task has to know of a model: a `Program`, or a model of transformers (`EagerModel`)."""

    @property
    def task(self) -> "Task": ...
    @property
    def inputs(self) -> "tuple[Input, ...]": ...
    @property
    def config(self) -> PretrainedConfig: ...
    @property
    def loss_function(self) -> Callable[..., Any] | None: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def positions(self) -> int | None: ...


Row = dict[str, Tensor]
"""The inputs of a row, and perhaps its labels, by name."""


@dataclass(frozen=True)
class Input:
    """One input of a model.

    Attributes:
        axes: of each dimension, a name where sizes vary, else its size.
        below: integers are drawn below it, such as token ids; None for numbers of the model's own dtype.
        default: what fills the input where it is not given; None where it has to be.
    """

    name: str
    axes: tuple[str | int, ...]
    below: int | None = None
    default: int | None = None

    def shape(self, sizes: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in self.axes)

    def filled(self, sizes: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The input with its default, or zeros, everywhere.

        Args:
            dtype: of the model.
        """
        kind = torch.int64 if self.below is not None else dtype
        return torch.full(self.shape(sizes), self.default or 0, dtype=kind, device=device)

    def drawn(self, sizes: Mapping[str, int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """The input at random, on the CPU; its default where it has one."""
        if self.default is not None:
            return self.filled(sizes, dtype, torch.device("cpu"))
        if self.below is None:
            return torch.randn(self.shape(sizes), generator=generator).to(dtype)
        return torch.randint(self.below, self.shape(sizes), generator=generator)

    def cast(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Numbers in the model's dtype; integers as they are."""
        return value.to(dtype) if self.below is None and value.is_floating_point() else value

    def described(self) -> str:
        return f"({', '.join(map(str, self.axes))})"


class Task:
    """One task, such as causal language modelling; a file each in `graph.tasks`.

    Attributes:
        name: its spelling on the command line.
        auto: transformers' auto class that loads such models.
        tables: of `transformers.models.auto.modeling_auto`: the classes that do the task.
        output_class: what a program returns: the loss and the outputs.
        outputs: by name, the axes that its first dimensions have.
        cached: the model's code keeps a cache unless it is told not to.
        predicts_tokens: labels are tokens, so the loss is that of a perplexity.
        writes: a decoder writes a text about the input, and `text_metrics` compares it with the record's.
        has_classes: labels are classes of the configuration (id2label).
        records: what a record of the task's data holds, in words.
        peft: PEFT's name of the task, if it has one.
    """

    name: ClassVar[str] = "none"
    auto: ClassVar[str]
    tables: ClassVar[tuple[str, ...]]
    output_class: ClassVar[type[ModelOutput]]
    outputs: ClassVar[Mapping[str, tuple[str, ...]]]
    cached: ClassVar[bool] = False
    predicts_tokens: ClassVar[bool] = False
    writes: ClassVar[bool] = False
    has_classes: ClassVar[bool] = False
    records: ClassVar[str] = ""
    peft: ClassVar[str | None] = None

    def inputs(self, model: PreTrainedModel) -> tuple[Input, ...]:
        """What the model is called with: by default a text, or two."""
        return text_inputs(model, segments=True)

    def loss(self, model: TaskModel, outputs: Mapping[str, Tensor], labels: Tensor, **kwargs: Any) -> Tensor:
        """The mean loss, or with `num_items_in_batch` the sum over the labels divided by it.

        By default the cross entropy of logits (..., classes) and labels (...), -100 where nothing is learned.
        """
        return cross_entropy(outputs["logits"], labels, **kwargs)

    def encode(self, record: Mapping[str, Any], processor: Any, model: TaskModel, length: int) -> Row | str:
        """The inputs of a record, and its labels if it has some: one row, without the dimension of the batch.

        Args:
            record: a row of the data; paths in it are absolute.
            processor: the model's tokenizer, image processor or both, as `AutoProcessor` makes them.
            length: tokens at most.

        Returns:
            A reason, where there is nothing in the record to learn from or to measure.

        Raises:
            UsageError: the record has not what it should have.
        """
        raise UsageError(f"{self.name} has no data of its own")

    def predict(self, outputs: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """What is predicted, and what should be: of every label that is not -100, (n,) each."""
        known = labels != -100
        return outputs["logits"].argmax(-1)[known], labels[known]

    def distance(
        self,
        ours: Mapping[str, Tensor],
        theirs: Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
        temperature: float = 1.0,
    ) -> Tensor:
        """How far the outputs of a model are from another's, to train by: a mean over rows, or tokens.

        By default T^2 KL(theirs || ours) of the softmax of logits at the temperature T, in nats (Hinton et al., 2015),
        the sum over the outputs; of single numbers, the square of the difference.

        Args:
            batch: the inputs, and the labels if there are any.
        """
        parts: list[Tensor] = []
        for name, axes in self.outputs.items():
            mine, other = (side[name].float() / temperature for side in (ours, theirs))
            seen = batch.get("attention_mask") if LENGTH in axes else None
            if TARGET in axes:
                seen = batch["labels"] != -100
            if seen is not None and mine.ndim == len(axes):  # a distribution over the tokens
                mine, other = (
                    each.masked_fill(seen == 0, torch.finfo(each.dtype).min) for each in (mine, other)
                )
            elif seen is not None:
                mine, other = mine[seen.bool()], other[seen.bool()]
            if mine.shape[-1] == 1:
                parts.append(mse_loss(mine, other) * temperature**2)
                continue
            ours_log, theirs_log = mine.log_softmax(-1), other.log_softmax(-1)
            total = kl_div(ours_log, theirs_log, log_target=True, reduction="sum") * temperature**2
            parts.append(total / max(1, ours_log[..., 0].numel()))
        return torch.stack(parts).sum()

    def metrics(self, predicted: Tensor, wanted: Tensor) -> dict[str, float]:
        """Figures beside the loss, of all that `predict` gave."""
        return {"accuracy": float((predicted == wanted).double().mean())}

    def text_metrics(self, written: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
        """How near the texts that a model has written are to those of the records; of a task that `writes`."""
        return {}

    def __repr__(self) -> str:
        return f"<task {self.name}>"

    def claims(self, architecture: str, config: PretrainedConfig) -> bool:
        """Whether models of a class, by its name, are of the task unless another is asked for."""
        return architecture in classes(*self.tables)

    def takes(self, model: PreTrainedModel) -> bool:
        """Whether a model can be run for the task."""
        return type(model).__name__ in classes(*self.tables)


TASKS: Registry[type[Task]] = Registry("task", "spp_fx.tasks", "spp_fx.graph.tasks")
register = naming(TASKS)

CAUSAL_LM = "causal-lm"
DETECTED = (
    CAUSAL_LM,
    "seq2seq-lm",
    "masked-lm",
    "sequence-classification",
    "token-classification",
    "question-answering",
    "speech-seq2seq",
    "image-text-to-text",
    "image-classification",
    "feature-extraction",
)
"""The order in which tasks are asked whether they know a class: some know the same, such as those of BART."""


def classes(*tables: str) -> frozenset[str]:
    """The names of the classes in tables of transformers' auto classes."""
    found = (names for table in tables for names in getattr(modeling_auto, table, {}).values())
    return frozenset(name for names in found for name in ((names,) if isinstance(names, str) else names))


def model_types(table: str) -> frozenset[str]:
    """The model types in a table of transformers' auto classes."""
    return frozenset(getattr(modeling_auto, table, {}))


def find_task(name: str) -> Task:
    """The task of a name; UsageError lists what is known."""
    return TASKS.find(name)()


def known_tasks() -> Iterator[Task]:
    """All tasks, in the order in which a class is looked for."""
    others = sorted(TASKS.keys() - set(DETECTED))
    return (TASKS[name]() for name in (*DETECTED, *others) if name in TASKS)


def task_of(config: PretrainedConfig) -> Task | None:
    """The task of the classes that a configuration names, if it is known; a model without a head may be of two."""
    names = config.architectures or ()
    return next((task for name in names for task in known_tasks() if task.claims(name, config)), None)


def task_of_model(model: nn.Module) -> Task:
    """The task that a model is made for; UsageError if none is known."""
    name = type(model).__name__
    if isinstance(model, PreTrainedModel):
        for task in known_tasks():
            if (task.claims(name, model.config) or _is_foreign(model)) and task.takes(model):
                return task
    raise UsageError(
        f"{name} is of none of the tasks that are known: {', '.join(each.name for each in known_tasks())}"
    )


def _is_foreign(model: PreTrainedModel) -> bool:
    return not type(model).__module__.startswith("transformers.")


def vocabulary_of(config: PretrainedConfig) -> int:
    """How many tokens a model has, 0 for one of images. Multimodal configurations hold it in their text's."""
    return getattr(config.get_text_config(decoder=True), "vocab_size", 0)


def positions_of(model: PreTrainedModel) -> int | None:
    """The most tokens that a model has positions for; None if it names no limit, or takes no tokens."""
    if not (accepts(model, "input_ids") or accepts(model, "decoder_input_ids")):
        return None
    text = model.config.get_text_config(decoder=True)
    named = (getattr(text, name, None) for name in ("max_position_embeddings", "max_target_positions"))
    limits = [limit for limit in named if isinstance(limit, int) and limit > 0]  # XLNet says -1
    if not limits:
        return None
    # RoBERTa's table of positions begins behind that of padding.
    tokens = model.get_input_embeddings()
    tables = (each for each in model.modules() if isinstance(each, nn.Embedding) and each is not tokens)
    before = (
        int(t.padding_idx) + 1 for t in tables if t.padding_idx is not None and t.num_embeddings == limits[0]
    )
    return min(limits) - max(before, default=0)


def accepts(model: PreTrainedModel, argument: str) -> bool:
    """Whether a model's own forward names an argument."""
    return argument in inspect.signature(type(model).forward).parameters


def text_inputs(model: PreTrainedModel, *, segments: bool = False) -> tuple[Input, ...]:
    """Token ids and their mask, and with `segments` the numbers of the texts that tokens belong to.

    Segments are an input where the model has several, and takes them.

    Raises:
        UsageError: the configuration does not say how many tokens there are.
    """
    config = model.config.get_text_config(decoder=not model.config.is_encoder_decoder)
    tokens, vocabulary = (BATCH, LENGTH), getattr(config, "vocab_size", None)
    if vocabulary is None:
        raise UsageError(
            f"{type(model).__name__} takes no tokens of a vocabulary (vocab_size of config.json)"
        )
    found = [Input("input_ids", tokens, vocabulary), Input("attention_mask", tokens, 2, default=1)]
    kinds = getattr(config, "type_vocab_size", 0) or 0
    if segments and kinds > 1 and accepts(model, "token_type_ids"):
        found.append(Input("token_type_ids", tokens, kinds, default=0))
    return tuple(found)


def decoder_input(model: PreTrainedModel) -> Input:
    """Token ids of the decoder of an encoder-decoder model; UsageError if it takes none."""
    vocabulary = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    if vocabulary is None or not accepts(model, "decoder_input_ids"):
        raise UsageError(f"{type(model).__name__} has no decoder that takes tokens")
    return Input("decoder_input_ids", (BATCH, TARGET), vocabulary)


def pixel_inputs(model: PreTrainedModel) -> tuple[Input, ...]:
    """An image a row, of the size that the model was made for.

    Raises:
        UsageError: the configuration does not say which.
    """
    config = getattr(model.config, "vision_config", None) or model.config
    size = getattr(config, "image_size", None)
    if isinstance(size, dict):
        size = [size.get("height"), size.get("width")]
    sides = list(size) if isinstance(size, list | tuple) else [size, size]
    sides = [side for side in sides if isinstance(side, int)]
    if len(sides) != 2 or not accepts(model, "pixel_values"):
        raise UsageError(
            f"{type(model).__name__} does not take images of one size (image_size of config.json)"
        )
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
    return (Input("pixel_values", (BATCH, channels, *sides)),)


def sound_inputs(model: PreTrainedModel) -> tuple[Input, ...]:
    """A recording a row: log-mel frames, or samples, and their mask where the model takes one.

    Raises:
        UsageError: the model takes something else.
    """
    config, name = model.config, model.main_input_name
    mask = (
        (Input("attention_mask", (BATCH, FRAMES), 2, default=1),) if accepts(model, "attention_mask") else ()
    )
    if name == "input_features" and (bins := getattr(config, "num_mel_bins", None)):
        # Whisper's encoder has a position for each two frames, and takes no others.
        return (Input(name, (BATCH, bins, 2 * config.max_source_positions)),)
    if name == "input_features" and (width := getattr(config, "input_feat_per_channel", None)):
        return (Input(name, (BATCH, FRAMES, width * config.input_channels)), *mask)
    if name == "input_values":
        return (Input(name, (BATCH, FRAMES)), *mask)
    raise UsageError(f"{type(model).__name__} takes {name}, which is not a recording of a form that is known")


def next_token_loss(model: TaskModel, logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
    """The loss of the model's family: labels (batch, length) are the tokens themselves, -100 where none is learned."""
    assert model.loss_function is not None
    return model.loss_function(logits=logits, labels=labels, vocab_size=model.vocabulary, **kwargs)


def cross_entropy(
    logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **_: Any
) -> Tensor:
    """Cross entropy in float32 of logits (..., classes) and labels (...), -100 where nothing is learned."""
    labels = labels.to(logits.device).flatten()
    loss = cross_entropy_of(logits.float().flatten(0, -2), labels, reduction="sum", ignore_index=-100)
    return loss / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def classification_loss(
    config: PretrainedConfig,
    logits: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    **_: Any,
) -> Tensor:
    """The loss of logits (batch, labels) as transformers has it, by `problem_type` or the labels' form.

    Args:
        labels: (batch,) classes; (batch,) numbers to come near to, where there is one logit; (batch, labels) with
            1 for each class that applies.
    """
    if config.problem_type == "regression" or config.num_labels == 1:
        losses = mse_loss(logits.squeeze(-1).float(), labels.to(logits).float(), reduction="sum")
    elif config.problem_type == "multi_label_classification" or labels.ndim > 1:
        losses = binary_cross_entropy_with_logits(logits.float(), labels.to(logits).float(), reduction="sum")
    else:
        return cross_entropy(logits, labels, num_items_in_batch)
    return losses / (labels.numel() if num_items_in_batch is None else num_items_in_batch)


@dataclass(frozen=True)
class EagerModel:
    """A model of transformers as tasks see it."""

    task: Task
    model: PreTrainedModel

    @property
    def inputs(self) -> tuple[Input, ...]:
        return self.task.inputs(self.model)

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    @property
    def loss_function(self) -> Callable[..., Any] | None:
        return getattr(self.model, "loss_function", None)

    @property
    def vocabulary(self) -> int:
        return vocabulary_of(self.config)

    @property
    def positions(self) -> int | None:
        return positions_of(self.model)

    def answer(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs for a batch of inputs by name, which is moved to the model's device."""
        made = self.model(**self._placed(batch), **({"use_cache": False} if self.task.cached else {}))
        return {name: made[name] for name in self.task.outputs}

    def write(self, batch: Mapping[str, Tensor], most: int) -> Tensor:
        """The tokens that a decoder writes about a batch of inputs by name, (batch, tokens).

        It takes the likeliest one each time, of those that generation_config.json allows.

        Args:
            most: tokens at most, with the one that the decoder begins with.
        """
        given = {name: value for name, value in self._placed(batch).items() if name != "decoder_input_ids"}
        model: Any = self.model  # transformers types `generate` for models that have it
        return model.generate(
            **given, max_length=most, max_new_tokens=None, do_sample=False, num_beams=1
        ).cpu()

    def _placed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            entry.name: entry.cast(batch[entry.name], self.model.dtype).to(self.model.device)
            for entry in self.inputs
            if entry.name in batch
        }
