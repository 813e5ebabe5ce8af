"""The parts of the loss against their definitions."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from spp_fx.graph.trace import trace
from spp_fx.passes.canonicalize import Canonicalize
from spp_fx.passes.partition import Partition
from spp_fx.passes.pipeline import run_pipeline
from spp_fx.training.losses import Layers, distillation_loss, hidden_loss, squares
from tests.families import FAMILIES, batch, make_model


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_the_mean_over_the_tokens_that_are_predicted(temperature):
    student, teacher = 3 * random(2, 5, 7), 3 * random(2, 5, 7, seed=1)
    labels = torch.tensor([[3, 1, -100, 2, 5], [-100, -100, 4, -100, -100]])
    expected = []
    for row, position in ((0, 0), (0, 2), (0, 3), (1, 1)):
        p, q = ((each[row, position].double() / temperature).softmax(-1) for each in (teacher, student))
        expected.append(temperature**2 * (p * (p / q).log()).sum())
    ours = distillation_loss(student, teacher, labels, temperature=temperature)
    torch.testing.assert_close(ours.double(), torch.stack(expected).mean(), rtol=1e-5, atol=1e-6)


def test_hidden_states_are_compared_relative_to_the_teachers_and_padding_counts_nothing():
    student, teacher = (
        [random(3, 4, 6, seed=i) for i in (0, 1)],
        [5 * random(3, 4, 6, seed=i) for i in (2, 3)],
    )
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    for states in (*student, *teacher):
        states[mask == 0] = float("nan")
    expected = sum(
        (s[mask == 1] - t[mask == 1]).square().mean() / (t[mask == 1].square().mean() + 1e-6)
        for s, t in zip(student, teacher, strict=True)
    )
    whole = hidden_loss(student, teacher, mask, mask.sum(), squares(teacher, mask))
    torch.testing.assert_close(whole, torch.as_tensor(expected))
    rows = [
        hidden_loss(
            [s[i : i + 1] for s in student], [t[i : i + 1] for t in teacher], mask[i : i + 1], mask.sum(),
            squares(teacher, mask),
        )
        for i in range(3)
    ]  # fmt: skip
    torch.testing.assert_close(torch.stack(rows).sum(), whole)


FEW = ("llama", "gpt2", "mixtral")


@pytest.mark.parametrize(
    "family", [f if f in FEW else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_hidden_states_are_those_of_the_models_layers(family):
    model = make_model(family)
    expected: dict[str, Tensor] = {}
    program = trace(model)
    run_pipeline(program, [Canonicalize(), Partition()])
    for path in program.units:
        model.get_submodule(path).register_forward_hook(
            lambda module, arguments, output, path=path: expected.update(
                {path: output[0] if isinstance(output, tuple) else output}
            )
        )
    ids = batch()
    model(ids)
    layers = Layers.of(program)
    with layers.states() as states:
        program(ids)
    assert layers.width == 32
    assert len(states) == len(program.units) > 1
    for path, state in zip(program.units, states, strict=True):
        assert torch.equal(state, expected[path]), path


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_trainer_counts_the_tokens_that_are_predicted(family):
    program, ids = trace(make_model(family)), batch()
    assert program.loss_type == "ForCausalLM"
    logits = program(ids).logits[:, :-1].flatten(0, 1)
    loss = program(ids, labels=ids, num_items_in_batch=ids[:, 1:].numel()).loss
    torch.testing.assert_close(loss, cross_entropy(logits, ids[:, 1:].flatten()))
