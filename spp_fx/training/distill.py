"""Learning from the dense model: the teacher's whole distribution at every token instead of one label."""

from torch import Tensor
from torch.nn.functional import kl_div


def distillation_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Mean over predicted tokens of KL(teacher || student), in nats; Hinton et al., 2015, at temperature 1.

    Args:
        student: logits (batch, sequence, vocabulary).
        teacher: logits of the same shape.
        labels: (batch, sequence) int64; a position counts if the token after it is not -100.
    """
    counts = labels[:, 1:].flatten() != -100
    ours = student[:, :-1].flatten(0, 1)[counts].float().log_softmax(-1)
    theirs = teacher[:, :-1].flatten(0, 1)[counts].float().log_softmax(-1)
    return kl_div(ours, theirs, log_target=True, reduction="batchmean")
