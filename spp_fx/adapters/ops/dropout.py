"""Dropout on the adapter branch whose mask is recomputed from a seed instead of being kept."""

import torch
from torch import Tensor


@torch.library.custom_op("spp_fx::dropout_seed", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def dropout_seed(p: float) -> Tensor:
    """A seed drawn from torch's own generator: (), int64, on the CPU; 0 and no draw if nothing is dropped."""
    if p == 0:
        return torch.zeros((), dtype=torch.int64)
    return torch.randint(2**62, (), dtype=torch.int64)


@dropout_seed.register_fake
def _(p: float) -> Tensor:
    return torch.empty((), dtype=torch.int64)


@torch.library.custom_op("spp_fx::dropout", mutates_args=())
def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x with each element kept with probability 1 - p and divided by it; the choice is a function of seed.

    Args:
        x: any shape and floating dtype.
        seed: (), int64, as `dropout_seed` draws it.
        p: probability of dropping, in [0, 1).
    """
    return apply_dropout(x, seed, p)


@dropout.register_fake
def _(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return torch.empty_like(x)


def _setup(ctx, inputs, output) -> None:  # pyright: ignore[reportMissingParameterType]
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _backward(ctx, grad: Tensor):  # pyright: ignore[reportMissingParameterType]
    (seed,) = ctx.saved_tensors
    return dropout(grad, seed, ctx.p), None, None


dropout.register_autograd(_backward, setup_context=_setup)


def apply_dropout(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """The definition of `dropout`, for kernels; a fresh tensor in every case."""
    if p == 0 or seed is None:
        return x.clone()
    generator = torch.Generator(device=x.device).manual_seed(int(seed))
    kept = torch.rand(x.shape, generator=generator, device=x.device) >= p
    return x * kept / (1 - p)


DROPOUT = torch.ops.spp_fx.dropout.default
DROPOUT_SEED = torch.ops.spp_fx.dropout_seed.default
