"""The walk over the layers of programs of every family."""

import copy

import pytest
import torch
from torch import nn

from spp_fx.errors import FormatError, PatternError, PreconditionError, UsageError
from spp_fx.graph.program import Program
from spp_fx.graph.trace import trace
from spp_fx.passes.canonicalize import Canonicalize
from spp_fx.passes.causal import Causal
from spp_fx.passes.match import Match
from spp_fx.passes.partition import Partition
from spp_fx.passes.pipeline import parse_pipeline, print_pipeline, run_pipeline
from spp_fx.passes.prune_sites import Prune
from spp_fx.pruning.criteria.magnitude import Magnitude
from spp_fx.pruning.criteria.ria import Ria
from spp_fx.pruning.criteria.sparsegpt import SparseGpt
from spp_fx.pruning.criteria.wanda import Wanda
from spp_fx.pruning.statistics import Inputs, output_energy
from spp_fx.pruning.walk import FileStates, MemoryStates, Walk, fitted
from tests.families import FAMILIES, OTHER_TASKS, batch, make_model
from tests.passes.programs import sparse
from tests.pruning import plain


@pytest.mark.parametrize(("family", "causal"), [("llama", False), *((family, True) for family in FAMILIES)])
def test_layers_one_by_one_are_the_model(family, causal, tmp_path):
    model, program = sparse(family)
    run_pipeline(program.eval(), [Partition(), *([Causal()] if causal else [])])
    ids = batch(3, 12)
    with torch.no_grad():
        expected = model.eval()(ids, output_hidden_states=True).hidden_states
        walk, (_, samples) = Walk(program), fitted(program, ids)
        for states in (MemoryStates(), FileStates(tmp_path)):
            for i in range(3):
                values, shared = walk.enter(samples[i])
                states.save(0, i, values)
            states.finish(0)
            for layer in range(len(walk.layers) - 1):
                for i in range(3):
                    states.save(layer + 1, i, walk.run(layer, states.load(layer, i), shared))
                states.finish(layer + 1)
            for i in range(3):
                last = states.load(len(walk.layers) - 1, i)
                (hidden,) = [v for v in last if isinstance(v, torch.Tensor) and v.is_floating_point()]
                torch.testing.assert_close(hidden[0], expected[len(walk.layers) - 1][i], rtol=1e-5, atol=1e-5)


def test_states_that_cannot_be_written_or_read_are_errors_with_the_file(tmp_path):
    states = FileStates(tmp_path)
    states.save(0, 0, [torch.zeros(4)])
    (file,) = (tmp_path / "states-00000").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"00000\.safetensors: is damaged .*--fresh"):
        states.load(0, 0)
    file.unlink()
    file.mkdir()
    with pytest.raises(IsADirectoryError, match=file.name):
        states.save(0, 0, [torch.zeros(4)])


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt-oss"])
def test_every_matrix_sees_the_inputs_it_multiplies(family):
    """The energy of the outputs that calibration measures is what pruning everything would take."""
    _, program = sparse(family)
    for parameter in program.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    program.calibration = batch(8, 12)
    run_pipeline(program, [Match(dense=True), Partition(), Causal()])
    before = copy.deepcopy(program.state_dict())
    (report,) = run_pipeline(program, [Prune(Wanda(), pattern="2:4")])
    assert set(report.changed) == set(program.matched)
    for name, note in report.changed.items():
        assert note.startswith("2:4, 5")
        assert "output error" in note
        weight, old = program.weight(name), before[name]
        assert torch.equal(weight[weight != 0], old[weight != 0])
    untouched = before.keys() - program.matched.keys()
    assert all(torch.equal(before[name], program.state_dict()[name]) for name in untouched)


def test_experts_are_pruned_each_by_the_tokens_it_sees():
    model, program = sparse("mixtral")
    weight = program.weight("model.layers.0.mlp.experts.down_proj")
    torch.manual_seed(0)
    weight.data.normal_()
    program.calibration = batch(4, 12)
    run_pipeline(program, [Match(targets=("experts.down_proj",), dense=True), Partition()])
    dense = weight.detach().clone()
    seen: dict[int, list[torch.Tensor]] = {}

    def remember(module, args, output):
        hidden, chosen, _ = args
        for expert in range(4):
            rows = hidden[(chosen == expert).any(-1)]
            gate, up = torch.nn.functional.linear(rows, module.gate_up_proj[expert]).chunk(2, -1)
            seen.setdefault(expert, []).append(module.act_fn(gate) * up)

    hook = model.model.layers[0].mlp.experts.register_forward_hook(remember)
    with torch.no_grad():
        for row in program.calibration:
            model.eval()(row[None])
    hook.remove()
    run_pipeline(program, [Prune(Wanda(), pattern="50%")])
    for expert in range(4):
        x = torch.cat(seen[expert])
        score = dense[expert].abs() * (x**2).sum(0).sqrt()
        smallest = score.argsort(1)[:, : score.shape[1] // 2]
        expected = dense[expert].scatter(1, smallest, 0)
        assert torch.equal(program.weight("model.layers.0.mlp.experts.down_proj")[expert], expected)


class Twice(nn.ModuleList):
    """Layers that the model runs one after another, and then again."""

    def __getitem__(self, index):
        own = super().__getitem__(index)
        return [*own, *own] if isinstance(index, slice) else own


@pytest.mark.parametrize("called_twice", [False, True])
def test_a_shared_weight_is_pruned_once_by_the_inputs_of_all_its_uses(called_twice):
    model = make_model("llama").eval()
    layers = model.model.layers
    if called_twice:
        model.model.layers = layers = Twice(layers[:1])
    else:
        layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    weight = layers[0].mlp.up_proj.weight
    program = trace(model).eval()
    program.calibration = ids = batch(4, 12)
    run_pipeline(program, [Canonicalize(), Match(dense=True), Partition(), Causal()])
    (walked,) = Walk(program).layers
    assert walked.units == tuple(program.units)
    seen: list[torch.Tensor] = []
    hooks = [
        layer.mlp.up_proj.register_forward_hook(lambda _, args, output: seen.append(args[0].flatten(0, -2)))
        for layer in layers.children()
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    dense, x = weight.detach().clone(), torch.cat(seen)
    (report,) = run_pipeline(program, [Prune(Wanda(), pattern="50%")])
    smallest = (dense.abs() * (x**2).sum(0).sqrt()).argsort(1)[:, : dense.shape[1] // 2]
    assert torch.equal(weight, dense.scatter(1, smallest, 0))
    assert called_twice or "is pruned with it" in report.skipped["model.layers.1.mlp.up_proj.weight"]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(program(ids).logits, expected, rtol=1e-5, atol=1e-5)


def rows_of(family: str, program: Program) -> list[dict[str, torch.Tensor]]:
    """Samples of a task: texts of several lengths, images or recordings."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in (9, 5, 9, 12):
        sizes = {"batch": 1, "length": length, "target": 3 + length // 3}
        row = {entry.name: entry.drawn(sizes, torch.float32, generator) for entry in program.inputs}
        if family == "llava":
            row["input_ids"] = torch.cat([torch.full((1, 4), 95), row["input_ids"].clamp(max=94)], 1)
            row["attention_mask"] = torch.ones_like(row["input_ids"])
        found.append(row)
    return found


@pytest.mark.parametrize("family", OTHER_TASKS)
def test_layers_of_every_task_are_pruned_by_what_the_pruned_ones_before_give(family):
    torch.manual_seed(0)
    model = OTHER_TASKS[family]().eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    program = trace(model, task="image-text-to-text" if family == "llava" else None).eval()
    eager, rows = copy.deepcopy(model), rows_of(family, program)
    run_pipeline(program, [Canonicalize(), Match(targets=("*",), dense=True), Partition(), Causal()])
    for name in [name for name in program.matched if program.sites[name].layer is None]:
        del program.matched[name]
    modules = dict(eager.named_modules())
    linears = {name: modules[name.rpartition(".")[0]] for name in program.matched}
    order: list[str] = []  # of the layers, as the model calls them
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: order.append(program.sites[name].layer))
        for name, module in linears.items()
    ]
    with torch.no_grad():
        eager(**rows[0])
    for hook in hooks:
        hook.remove()
    layers = list(dict.fromkeys(order))
    assert len(layers) == len(program.units) >= 2
    for layer in layers:
        own = [name for name in linears if program.sites[name].layer == layer]
        inputs = plain.inputs_of(eager, [linears[name] for name in own], rows)
        for name, x in zip(own, inputs, strict=True):
            weight = linears[name].weight.data
            weight.copy_(plain.pruned(weight, x, len(rows), "wanda", "50%", False))
    program.calibration = rows
    run_pipeline(program, [Prune(Wanda(), pattern="50%")])
    for name, linear in linears.items():
        assert torch.equal(program.weight(name), linear.weight), name


def test_an_expert_that_saw_no_token_is_pruned_by_magnitude_and_says_so():
    _, program = sparse("mixtral")
    program.calibration = batch(1, 2)
    run_pipeline(program, [Match(targets=("experts.down_proj",), dense=True), Partition()])
    (report,) = run_pipeline(program, [Prune(SparseGpt(damp=0.1), pattern="2:4")])
    assert "received no token: pruned by magnitude" in " ".join(report.changed.values())


def ready(family: str = "llama"):
    _, program = sparse(family)
    program.calibration = batch(4, 12)
    run_pipeline(program, [Match(dense=True), Partition()])
    return program


def test_inputs_that_are_not_finite_are_refused_by_name():
    program = ready()
    program.get_parameter("model.layers.1.input_layernorm.weight").data[3] = torch.nan
    with pytest.raises(
        PatternError, match=r"layers\.1\.self_attn\.\w+\.weight: its inputs are NaN .* sample 1"
    ):
        run_pipeline(program, [Prune(Wanda())])


def test_a_weight_that_is_not_finite_is_refused_by_name():
    program = ready()
    program.weight("model.layers.0.self_attn.q_proj.weight").data[0, 0] = torch.inf
    with pytest.raises(PatternError, match=r"(its inputs are|holds) NaN or inf"):
        run_pipeline(program, [Prune(Magnitude())])


def test_a_hessian_that_is_not_positive_definite_is_refused_with_the_way_out():
    with pytest.raises(PatternError, match=r"layers\.0.*not positive definite with damp 0; raise --damp"):
        run_pipeline(ready(), [Prune(SparseGpt(damp=0.0))])


def test_dead_inputs_are_told():
    program = ready()
    program.get_parameter("model.layers.0.input_layernorm.weight").data[5:8] = 0
    (report,) = run_pipeline(program, [Prune(SparseGpt(damp=0.1))])
    assert "3 of its 32 inputs were always 0" in report.changed["model.layers.0.self_attn.q_proj.weight"]
    assert bool((program.weight("model.layers.0.self_attn.q_proj.weight")[:, 5:8] == 0).all())


def test_sites_outside_of_layers_are_refused_with_the_reason():
    program = ready()
    run_pipeline(program, [Match(targets=("lm_head", "q_proj"), dense=True)])
    (report,) = run_pipeline(program, [Prune(Wanda())])
    assert "outside the layers" in report.skipped["lm_head.weight"]
    assert set(program.matched) == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}


def test_ratios_and_skips_are_per_site():
    program = ready()
    ratios = ("down_proj@1:4", "model.layers.0.*@4:8", "k_proj@75%")
    (report,) = run_pipeline(program, [Prune(Ria(), ratios=ratios, skip=("v_proj",))])
    assert str(program.matched["model.layers.1.mlp.down_proj.weight"]) == "1:4"
    assert str(program.matched["model.layers.0.mlp.down_proj.weight"]) == "4:8"
    assert str(program.matched["model.layers.0.self_attn.k_proj.weight"]) == "75%"
    assert str(program.matched["model.layers.1.self_attn.q_proj.weight"]) == "2:4"
    assert report.skipped["model.layers.0.self_attn.v_proj.weight"] == "is excluded by --skip"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("method=wand", "unknown pruning method 'wand'"),
        ("method=wanda,damp=0.5", "wanda has no option damp; it has: none; sparsegpt has it"),
        ("method=sparsegpt,colour=red", "sparsegpt has no option colour; it has: block-size, damp$"),
        ("repair=fsnot", "unknown repair"),
        ("pattern=2to4", "is not a sparsity pattern"),
        ("method=sparsegpt,block_size=0", "at least 1"),
        ("method=sparsegpt,damp=-1.0", "at least 0"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(options, message):
    with pytest.raises(UsageError, match=message):
        run_pipeline(sparse("llama")[1], parse_pipeline(f"prune{{{options}}}"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": ("q_proj",)}, "write NAME@PATTERN"),
        ({"ratios": ("nothing@2:4",)}, "names no site"),
        ({"ratios": ("q_proj@100%",)}, "leave no weight at all"),
        ({"skip": ("*",)}, "--skip excludes every site"),
    ],
)
def test_wrong_rules_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        run_pipeline(ready(), [Prune(**options)])


def test_what_a_pass_needs_is_said():
    _, program = sparse("llama")
    with pytest.raises(PreconditionError, match="run match"):
        run_pipeline(program, [Prune()])
    run_pipeline(program, [Match(dense=True)])
    with pytest.raises(PreconditionError, match="give the text to calibrate on"):
        run_pipeline(program, [Prune(Wanda())])
    program.calibration = batch(2, 12)
    with pytest.raises(PreconditionError, match="run partition first"):
        run_pipeline(program, [Prune(Wanda())])
    with pytest.raises(PatternError, match="not a multiple of the group of 2:5"):
        run_pipeline(program, [Prune(pattern="2:5")])


def test_spelling():
    (item,) = parse_pipeline("prune{method=sparsegpt,ratios=down_proj@4:8,q_proj@50%,damp=0.1}")
    assert print_pipeline([item]) == "prune{method=sparsegpt,damp=0.1,ratios=down_proj@4:8,q_proj@50%}"
    assert item == Prune(SparseGpt(damp=0.1), ratios=("down_proj@4:8", "q_proj@50%"))


def test_statistics_are_those_of_the_tokens():
    torch.manual_seed(0)
    samples = [torch.randn(40, 6).bfloat16() for _ in range(3)]
    inputs = Inputs(6, hessian=True, samples=3)
    for sample in samples:
        inputs.add(sample)
    x = torch.cat(samples).double()
    torch.testing.assert_close(inputs.norms.double(), (x.square().sum(0) / 3).sqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close(inputs.mean.double(), x.mean(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(inputs.variance.double(), x.var(0, unbiased=False), rtol=1e-5, atol=0)
    torch.testing.assert_close(inputs.hessian.double(), 2 / 3 * x.t() @ x, rtol=1e-5, atol=1e-5)
    assert inputs.tokens == 120


def test_output_energy_leaves_weights_alone():
    torch.manual_seed(0)
    x, weight, other = torch.randn(7, 6), torch.randn(5, 6), torch.randn(5, 6)
    mask, before = torch.rand(5, 6) < 0.5, weight.clone()
    assert output_energy(x, weight) == pytest.approx(float((x @ weight.t()).square().sum()), rel=1e-5)
    lost = float((x @ (weight - other).t()).square().sum())
    assert output_energy(x, weight, minus=other) == pytest.approx(lost, rel=1e-5)
    lost = float((x @ (weight * ~mask).t()).square().sum())
    assert output_energy(x, weight, without=mask) == pytest.approx(lost, rel=1e-5)
    assert torch.equal(weight, before)
