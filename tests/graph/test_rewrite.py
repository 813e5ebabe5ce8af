"""Graph surgery on small graphs: what is erased, what stays, and what a part moved out computes."""

import operator

import torch
from torch import fx, nn

from spp_fx.graph.rewrite import Graph, change_call, erase_unused, extract, reach, replace_by_call

aten = torch.ops.aten


def names(graph: fx.Graph) -> list[str]:
    return [node.name for node in graph.nodes]


def small() -> tuple[fx.Graph, dict[str, fx.Node]]:
    """out = relu(x) + (x * x + 1), and a write into x that nothing reads."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(aten.add_.Scalar, (x, 1))
    square = graph.call_function(operator.mul, (x, x))
    shifted = graph.call_function(operator.add, (square, 1))
    relu = graph.call_function(aten.relu.default, (x,))
    total = graph.call_function(operator.add, (relu, shifted))
    graph.output(total)
    return graph, {"x": x, "square": square, "shifted": shifted, "relu": relu, "total": total}


def test_a_replaced_node_takes_along_what_only_it_used_and_nothing_else():
    graph, nodes = small()
    nodes["shifted"].meta["site"] = "w"
    replace_by_call(nodes["shifted"], aten.neg.default, nodes["x"], mark=1)
    assert names(graph) == ["x", "add__scalar", "neg_default", "relu_default", "add_1", "output"]
    (new,) = graph.find_nodes(op="call_function", target=aten.neg.default)
    assert new.meta == {"site": "w", "mark": 1}
    x = torch.tensor([-2.0, 3.0])
    assert torch.equal(fx.GraphModule(nn.Module(), graph)(x.clone()), (x + 1).relu() - (x + 1))


def test_a_write_that_nothing_reads_is_not_dead_code():
    graph, nodes = small()
    before = names(graph)
    erase_unused(nodes["total"], nodes["x"])
    assert names(graph) == before


def test_a_changed_call_drops_its_old_operands():
    graph, nodes = small()
    change_call(nodes["total"], aten.neg.default, nodes["relu"])
    assert names(graph) == ["x", "add__scalar", "relu_default", "add_1", "output"]


def test_an_extracted_part_computes_what_it_did():
    _, nodes = small()
    part = extract([nodes["square"], nodes["shifted"]], [nodes["x"]], nodes["shifted"])
    assert part(torch.tensor(3.0)) == 10


def test_everything_is_reached_once():
    _, nodes = small()
    reached = list(reach([nodes["total"]], lambda node: node.all_input_nodes))
    assert len(reached) == len(set(reached)) == 5


def test_recompiling_a_graph_leaves_those_below_it_alone():
    root, graph = nn.Module(), fx.Graph()
    root.inner = inner = Graph(nn.Module(), small()[0], class_name="Graph")
    graph.output(graph.call_module("inner", (graph.placeholder("x"),)))
    outer = Graph(root, graph, class_name="Graph")
    compiled = type(inner).forward, type(outer).forward
    outer.recompile()
    assert type(inner).forward is compiled[0]
    assert type(outer).forward is not compiled[1]
    x = torch.tensor([-2.0, 3.0])
    assert torch.equal(outer(x.clone()), inner(x.clone()))
