"""Block reconstruction against a plain loop over transformers' own layers, on a real model."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from spp_fx.graph.trace import trace
from spp_fx.verbs.load import draw_windows
from spp_fx.verbs.prune import prune
from spp_fx.verbs.reconstruct import reconstruct
from spp_fx.verbs.settings import Calibration
from tests.pruning import plain
from tests.real_data import data_folder

ROWS, LR, EPOCHS = 4, 1e-2, 2


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """The dense and the pruned folder, a calibration, and its tokens."""
    data, folder = data_folder(), tmp_path_factory.mktemp("pruned")
    dense = data / "story-656k"
    calibration = Calibration(data / "tinystories" / "train.txt", 8, 64)
    prune(dense, folder / "sparse", method="magnitude", pattern="2:4")
    return dense, folder / "sparse", calibration, draw_windows(dense, trace(dense), calibration).tokens


def load(folder) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def states(model: LlamaForCausalLM, tokens: Tensor, index: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """What a layer is given, for each batch of rows."""
    seen = []
    hook = model.model.layers[index].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0], kwargs)), with_kwargs=True
    )
    for rows in tokens.split(ROWS):
        model(rows, use_cache=False)
    hook.remove()
    return seen


def _left(steps: int, step: int) -> float:
    return 1 - step / steps


def train_plainly(sparse: LlamaForCausalLM, dense: LlamaForCausalLM, tokens: Tensor) -> None:
    """AdamW on the kept weights of one layer after another, towards what the dense model's layer makes."""
    for index, (layer, teacher) in enumerate(zip(sparse.model.layers, dense.model.layers, strict=True)):
        given, wanted = states(sparse, tokens, index), states(dense, tokens, index)
        with torch.no_grad():
            wanted = [teacher(x, **options) for x, options in wanted]
        energy = sum(float(w.double().square().sum()) for w in wanted)
        linears = [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]
        base = [m.weight.detach().clone() for m in linears]
        deltas = [torch.zeros_like(w).requires_grad_() for w in base]
        optimizer = torch.optim.AdamW(deltas, LR, betas=(0.9, 0.95), weight_decay=0)
        order, count = torch.Generator().manual_seed(index), len(given)
        batches = [int(i) for _ in range(EPOCHS) for i in torch.randperm(count, generator=order)]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_left, len(batches)))
        for i in batches:
            new = {
                f"{name}.weight": w + d * (w != 0)
                for (name, _), w, d in zip(
                    ((n, m) for n, m in layer.named_modules() if m in linears), base, deltas, strict=True
                )
            }
            x, options = given[i]
            made = torch.func.functional_call(layer, new, (x,), options)
            loss = (made - wanted[i]).square().sum() * count / energy
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(deltas, 1.0)
            optimizer.step()
            schedule.step()
        for linear, w, d in zip(linears, base, deltas, strict=True):
            linear.weight.data.copy_(w + d.detach() * (w != 0))


def test_training_is_the_plain_loop(pruned, tmp_path):
    dense, sparse, calibration, tokens = pruned
    reconstruct(
        sparse,
        tmp_path / "out",
        teacher=dense,
        calibration=calibration,
        epochs=EPOCHS,
        batch_size=ROWS,
        lr=LR,
    )
    ours, reference = load_file(tmp_path / "out" / "model.safetensors"), load(sparse)
    before = load_file(sparse / "model.safetensors")
    train_plainly(reference, load(dense), tokens)
    for name, tensor in reference.state_dict().items():
        if "_proj" not in name:
            continue
        change = (tensor - before[name]).norm()
        assert change > 0.01 * before[name].norm()
        assert (ours[name] - tensor).norm() <= 2e-3 * change, name
        assert torch.equal(ours[name] != 0, before[name] != 0)


def test_admm_is_the_algorithm_on_the_layers_as_they_are_by_then(pruned, tmp_path):
    dense, sparse, calibration, tokens = pruned
    reconstruct(sparse, tmp_path / "out", teacher=dense, calibration=calibration, method="admm")
    ours, reference, teacher = load_file(tmp_path / "out" / "model.safetensors"), load(sparse), load(dense)
    for layer, other in zip(reference.model.layers, teacher.model.layers, strict=True):
        linears = {n: m for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
        inputs = plain.inputs_of(reference, list(linears.values()), tokens)
        for (name, linear), x in zip(linears.items(), inputs, strict=True):
            weight = other.get_submodule(name).weight.data
            linear.weight.data.copy_(plain.admm(weight, x, linear.weight.data != 0))
    for name, tensor in reference.state_dict().items():
        if "_proj" in name:
            assert (ours[name] - tensor).norm() <= 1e-4 * tensor.norm(), name
