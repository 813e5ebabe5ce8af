"""Every criterion once more, as plainly as its paper has it: the whole model in memory, float32, no blocks."""

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from spp_fx.sparsity.pattern import NM, parse_pattern

Array = np.ndarray


def prune(
    model: PreTrainedModel,
    tokens: Tensor,
    method: str,
    pattern: str,
    *,
    repair: bool = False,
    update: bool = False,
) -> None:
    """Prune the linears of a Llama's layers, one layer after the other, on what the pruned ones before give."""
    for layer in model.model.layers:
        linears = {n: m for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
        inputs = inputs_of(model, list(linears.values()), tokens)
        for linear, x in zip(linears.values(), inputs, strict=True):
            weight = linear.weight.data
            new = pruned(weight, x, len(tokens), method, pattern, repair)
            weight.copy_(admm(weight, x, new != 0) if update else new)


@torch.no_grad()
def inputs_of(
    model: PreTrainedModel, linears: list[torch.nn.Module], samples: Tensor | list[dict[str, Tensor]]
) -> list[Tensor]:
    """(tokens, in) of each linear, over all samples."""
    seen: list[list[Tensor]] = [[] for _ in linears]
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, found=found: found.append(args[0].flatten(0, -2)))
        for linear, found in zip(linears, seen, strict=True)
    ]
    for row in samples:
        model(**row) if isinstance(row, dict) else model(row[None])
    for hook in hooks:
        hook.remove()
    return [torch.cat(found) for found in seen]


def pruned(weight: Tensor, x: Tensor, samples: int, method: str, text: str, repair: bool) -> Tensor:
    pattern, size = parse_pattern(text), weight.abs()
    norm = ((x**2).sum(0) / samples).sqrt()
    if method == "sparsegpt":
        return sparsegpt(weight, x, samples, text)
    if method == "magnitude":
        mask = largest(size, text, rows=False)
    elif method == "wanda":
        mask = largest(size * norm, text, rows=True)
    else:
        score = (size / size.sum(0) + size / size.sum(1, keepdim=True)) * norm**0.5
        mask = largest(score, text, rows=False)
    if repair:
        group = pattern.group if isinstance(pattern, NM) else 0
        share, variance = (weight * x.mean(0)).numpy(), x.double().var(0, unbiased=False).numpy()
        rows = zip(share, (size * norm).numpy(), mask.numpy(), strict=True)
        mask = torch.stack([dsnot(own, cost, keep, variance, group) for own, cost, keep in rows])
    return torch.where(mask, weight, 0)


def largest(score: Tensor, text: str, *, rows: bool) -> Tensor:
    """The entries that are kept, by a full sort."""
    pattern = parse_pattern(text)
    if isinstance(pattern, NM):
        compared, drop = score.reshape(-1, pattern.group), pattern.group - pattern.kept
    else:
        compared = score if rows else score.reshape(1, -1)
        drop = int(pattern.share * compared.shape[1])
    order = compared.argsort(dim=1, descending=True, stable=True)
    mask = torch.ones_like(compared, dtype=torch.bool)
    return mask.scatter(1, order[:, compared.shape[1] - drop :], False).reshape(score.shape)


def sparsegpt(weight: Tensor, x: Tensor, samples: int, text: str, block: int = 128) -> Tensor:
    pattern, w = parse_pattern(text), weight.clone()
    h = 2 / samples * x.T @ x
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h))
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    keep = torch.ones_like(w, dtype=torch.bool)
    for start in range(0, w.shape[1], block):
        stop = min(start + block, w.shape[1])
        diagonal = u.diagonal()[start:stop] ** 2
        if not isinstance(pattern, NM):
            keep[:, start:stop] = largest(w[:, start:stop] ** 2 / diagonal, text, rows=False)
        for j in range(start, stop):
            if isinstance(pattern, NM) and j % pattern.group == 0:
                group = slice(j, j + pattern.group)
                keep[:, group] = largest(w[:, group] ** 2 / u.diagonal()[group] ** 2, text, rows=False)
            error = torch.where(keep[:, j], 0, w[:, j]) / u[j, j]
            w[:, j + 1 :] -= error[:, None] * u[j, j + 1 :]
            w[:, j] = torch.where(keep[:, j], w[:, j], 0)
    return w


def admm(weight: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """In float64, with W in (in, out) order and an inverse, as the paper has it."""
    x, m = x.double(), mask.T.double()
    c = x.T @ x
    d = c.diagonal().sqrt() + 1e-8
    c = c / torch.outer(d, d)
    w = d[:, None] * weight.T.double()
    c += 0.1 * c.diagonal().mean() * torch.eye(len(c))
    k, p, u = c @ w, torch.linalg.inv(c + torch.eye(len(c))), torch.zeros_like(w)
    for _ in range(20):
        z = (w + u) * m
        u = u + w - z
        w = p @ (k + z - u)
    return ((w + u) * m / d[:, None]).T


def dsnot(share: Array, cost: Array, keep: Array, variance: Array, group: int) -> Tensor:
    """One row, one swap at a time."""
    kept, free = keep.copy(), np.ones(len(keep), bool)
    error = share[~kept].sum(dtype=np.float64)
    for _ in range(50):
        if abs(error) <= 0.1:
            break
        sign = np.sign(error)
        prunes = kept & free & (share * sign < 0)
        grows = ~kept & free & (share * sign > 0)
        if group:
            grows &= np.repeat(prunes.reshape(-1, group).any(1), group)
        if not grows.any() or not prunes.any():
            break
        grown = np.where(grows, share * sign / variance, -np.inf).argmax()
        if group:
            prunes &= np.arange(len(kept)) // group == grown // group
        gone = np.where(prunes, cost, np.inf).argmin()
        after = error - share[grown] + share[gone]
        if group and after * sign <= 0:
            break
        kept[[grown, gone]], error = [True, False], after
        free[[grown, gone]] = False
    return torch.from_numpy(kept)
