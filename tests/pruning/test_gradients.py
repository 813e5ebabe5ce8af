"""The walk back over the layers: its gradients are those of the whole model, in the memory of one layer."""

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from spp_fx.errors import PatternError, UsageError
from spp_fx.graph.program import Program
from spp_fx.graph.trace import trace
from spp_fx.passes.canonicalize import Canonicalize
from spp_fx.passes.causal import Causal
from spp_fx.passes.match import Match
from spp_fx.passes.partition import Partition
from spp_fx.passes.pipeline import run_pipeline
from spp_fx.pruning.gradients import Source, layer_gradients, without_gradient
from spp_fx.pruning.layerwise import InPlace
from spp_fx.pruning.walk import FileStates, MemoryStates, States, Walk, fitted
from tests.families import OTHER_TASKS, SPREAD, batch, make_model
from tests.passes.programs import sparse
from tests.pruning.test_walk import rows_of

CPU = torch.device("cpu")


def walked(family: str) -> tuple[torch.nn.Module, Program]:
    model, program = sparse(family)
    run_pipeline(program.eval(), [Match(), Partition(), Causal()])
    return model.eval(), program


def source(program: Program, states: States | None = None) -> Source:
    return Source(program, InPlace(), states or MemoryStates())


def expected(model: torch.nn.Module, program: Program, loss: Tensor) -> dict[str, Tensor]:
    """Gradients by one backward through the whole model, in canonical orientation."""
    weights = {name: model.get_parameter(name) for name in program.matched}
    found = torch.autograd.grad(loss, list(weights.values()))
    return {
        name: grad.transpose(-1, -2) if program.sites[name].transposed else grad
        for name, grad in zip(weights, found, strict=True)
    }


def logits_of(model: torch.nn.Module, ids: Tensor) -> Tensor:
    return torch.cat([model(row[None]).logits[:, :-1] for row in ids])


@pytest.mark.parametrize("family", SPREAD)
def test_gradients_are_those_of_the_whole_model(family, tmp_path):
    model, program = walked(family)
    ids = batch(3, 12)
    loss = cross_entropy(logits_of(model.requires_grad_(True), ids).flatten(0, 1), ids[:, 1:].flatten())
    wanted = expected(model, program, loss)
    order = []
    for each in layer_gradients(source(program, FileStates(tmp_path)), ids, list(wanted), device=CPU):
        order.append(program.sites[each.site].layer)
        assert torch.equal(each.weight, program.canonical_weight(each.site))
        size = wanted[each.site].abs().max()
        torch.testing.assert_close(each.grad, wanted.pop(each.site), rtol=1e-5, atol=2e-6 * float(size))
    assert not wanted
    assert order == sorted(order, reverse=True)


def test_a_teacher_gives_the_gradients_of_the_divergence_from_it():
    model, program = walked("llama")
    _, teacher = walked("llama")
    for parameter in teacher.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    ids = batch(2, 12)
    with torch.no_grad():
        told = log_softmax(torch.cat([teacher(row[None]).logits[:, :-1] for row in ids]), -1)
    own = log_softmax(logits_of(model.requires_grad_(True), ids), -1)
    loss = kl_div(own.flatten(0, 1), told.flatten(0, 1), reduction="batchmean", log_target=True)
    wanted = expected(model, program, loss)
    for each in layer_gradients(source(program), ids, list(wanted), device=CPU, teacher=source(teacher)):
        size = float(wanted[each.site].abs().max())
        torch.testing.assert_close(each.grad, wanted[each.site], rtol=1e-4, atol=1e-5 * size)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_layers_and_what_follows_them_are_the_model(family):
    model, program = walked(family)
    ids, walk = batch(2, 9), Walk(program, to_end=True)
    with torch.no_grad():
        for row, sample in zip(ids, fitted(program, ids)[1], strict=True):
            values, shared = walk.enter(sample)
            for index in range(len(walk.layers)):
                values = walk.run(index, values, shared)
            torch.testing.assert_close(
                walk.leave(values, shared)["logits"], model(row[None]).logits, rtol=1e-5, atol=1e-5
            )
    assert "lm_head.weight" in walk.end_tensors()


class OneLayer(InPlace):
    """Notes which tensors are asked for at a time."""

    def __init__(self) -> None:
        self.held: list[str] = []
        self.most: set[tuple[str, ...]] = set()

    def fill(self, program, names, device):
        self.held += names
        self.most.add(tuple(sorted({name.split(".")[2] for name in self.held if ".layers." in name})))

    def empty(self, program, names):
        for name in names:
            self.held.remove(name)


def test_one_layer_and_its_gradients_are_held_at_a_time(tmp_path):
    _, program = walked("llama")
    weights, states, before = OneLayer(), FileStates(tmp_path), []
    sites = list(program.matched)
    for each in layer_gradients(Source(program, weights, states), batch(3, 12), sites, device=CPU):
        layer = program.sites[each.site].layer
        assert {name.rpartition(".layers.")[2][0] for name in weights.held} == {layer[-1]}
        gc.collect()
        assert [
            name for name, grad in before if grad() is not None and program.sites[name].layer != layer
        ] == []
        before.append((each.site, weakref.ref(each.grad)))
    assert weights.held == []
    assert weights.most == {(), ("0",), ("1",)}
    assert not list(tmp_path.iterdir())
    assert not any(parameter.grad is not None for parameter in program.parameters())


def test_gradients_of_float16_are_those_of_the_model_in_float32():
    model = make_model("llama", dtype=torch.float16, one_layer=True)
    program = trace(model).eval()
    run_pipeline(program, [Canonicalize(), Match(dense=True), Partition(), Causal()])
    ids = batch(3, 12)
    loss = cross_entropy(
        logits_of(model.float().requires_grad_(True), ids).flatten(0, 1), ids[:, 1:].flatten()
    )
    wanted = expected(model, program, loss)
    for parameter in program.parameters():
        parameter.data = parameter.data.half()
    for each in layer_gradients(source(program), ids, list(wanted), device=CPU):
        assert each.grad.dtype == torch.float32
        cosine = torch.cosine_similarity(each.grad.flatten(), wanted[each.site].flatten(), 0)
        assert float(cosine) > 0.9999
        assert float(each.grad.norm() / wanted[each.site].norm()) == pytest.approx(1, abs=1e-2)


def test_sites_without_a_gradient_of_one_layer_are_named():
    _, program = walked("gpt2")
    reasons = without_gradient(program, ["lm_head.weight", *program.matched])
    assert list(reasons) == ["lm_head.weight"]
    assert "outside the layers" in reasons["lm_head.weight"]


def test_a_loss_that_is_not_finite_is_refused():
    _, program = walked("llama")
    program.get_parameter("model.norm.weight").data[0] = torch.nan
    with pytest.raises(PatternError, match="loss of calibration sample 1 is nan"):
        next(layer_gradients(source(program), batch(2, 12), list(program.matched), device=CPU))


def test_gradients_of_a_task_are_those_of_its_loss():
    """Of rows of several lengths with labels: the mean of their losses."""
    torch.manual_seed(0)
    model = OTHER_TASKS["t5"]().eval().requires_grad_(True)
    program = trace(model).eval()
    run_pipeline(program, [Canonicalize(), Match(dense=True), Partition()])
    rows = rows_of("t5", program)
    with pytest.raises(UsageError, match="gradients of a loss need labels"):
        next(layer_gradients(source(program), rows, list(program.matched), device=CPU))
    for row in rows:
        row["labels"] = row["decoder_input_ids"].flip(1)
    wanted = expected(model, program, torch.stack([model(**row).loss for row in rows]).mean())
    for each in layer_gradients(source(program), rows, list(wanted), device=CPU):
        size = wanted[each.site].abs().max()
        torch.testing.assert_close(each.grad, wanted.pop(each.site), rtol=1e-4, atol=1e-5 * float(size))
    assert not wanted
