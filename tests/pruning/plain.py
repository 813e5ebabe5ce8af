"""Every criterion once more, as plainly as its paper has it: the whole model in memory, float32, no blocks."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spp_fx.sparsity import NM, parse_pattern


def prune(model: PreTrainedModel, tokens: Tensor, method: str, pattern: str, *, repair: bool = False) -> None:
    """Prune the linears of a Llama's layers, one layer after the other, on what the pruned ones before give."""
    for layer in model.model.layers:
        linears = {n: m for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
        inputs = inputs_of(model, list(linears.values()), tokens)
        for linear, x in zip(linears.values(), inputs, strict=True):
            weight = linear.weight.data
            weight.copy_(pruned(weight, x, len(tokens), method, pattern, repair))


@torch.no_grad()
def inputs_of(model: PreTrainedModel, linears: list[torch.nn.Module], tokens: Tensor) -> list[Tensor]:
    """(tokens, in) of each linear, over all samples."""
    seen: list[list[Tensor]] = [[] for _ in linears]
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, found=found: found.append(args[0].flatten(0, -2)))
        for linear, found in zip(linears, seen, strict=True)
    ]
    for row in tokens:
        model(row[None])
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
        mask = torch.stack([dsnot(w, keep, x, samples, group) for w, keep in zip(weight, mask, strict=True)])
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


def dsnot(weight: Tensor, keep: Tensor, x: Tensor, samples: int, group: int) -> Tensor:
    """One row, one swap at a time."""
    share = (weight * x.mean(0)).tolist()
    variance = x.double().var(0, unbiased=False).tolist()
    cost = (weight.abs() * ((x**2).sum(0) / samples).sqrt()).tolist()
    kept, moved = keep.tolist(), set()
    error = sum(s for s, k in zip(share, kept, strict=True) if not k)
    columns = range(len(kept))
    for _ in range(50):
        if abs(error) <= 0.1:
            break
        sign = 1 if error > 0 else -1
        prunes = [j for j in columns if kept[j] and j not in moved and share[j] * sign < 0]
        grows = [j for j in columns if not kept[j] and j not in moved and share[j] * sign > 0]
        if group:
            grows = [j for j in grows if any(k // group == j // group for k in prunes)]
        if not grows or not prunes:
            break
        grown = max(grows, key=lambda j: share[j] * sign / variance[j])
        if group:
            prunes = [k for k in prunes if k // group == grown // group]
        gone = min(prunes, key=lambda j: cost[j])
        after = error - share[grown] + share[gone]
        if group and after * sign <= 0:
            break
        kept[grown], kept[gone], error = True, False, after
        moved |= {grown, gone}
    return torch.tensor(kept)
