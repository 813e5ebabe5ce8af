"""Learning from the dense model: the teacher's whole distribution at every token instead of one label."""

from torch import Tensor
from torch.nn.functional import kl_div


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
