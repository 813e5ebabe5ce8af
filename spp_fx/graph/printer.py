"""A program as text, to read and to compare: every graph of the tree, one node a line."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from spp_fx.graph.program import ADAPTER, SITE, Program

DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.bool: "b1",
}


def print_program(program: Program) -> str:
    """The program as text, ending in a newline; the same program gives the same text.

    Parameters and buffers are shown with dtype and shape, sites and adapters with their names:

        graph model.layers.0.mlp.up_proj(%mul_4)
          %weight = attr weight f32[384x128]
          %linear = aten.linear(%mul_4, %weight)  # site model.layers.0.mlp.up_proj.weight
          return %linear
    """
    return "\n".join(_lines(program)) + "\n"


def _lines(program: Program) -> Iterator[str]:
    yield f"program {program.config.model_type}"
    for path, module in program.graphs():
        if not len(module.graph.nodes):
            continue
        inputs = ", ".join(f"%{n.name}" for n in module.graph.nodes if n.op == "placeholder")
        yield f"graph {path}({inputs})"
        for node in module.graph.nodes:
            if node.op != "placeholder":
                yield f"  {_node(module, node)}"


def _node(module: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "output":
        return f"return {_value(node.args[0])}"
    if node.op == "get_attr":
        return f"%{node.name} = attr {node.target}{_attribute(module, str(node.target))}"
    arguments = [_value(a) for a in node.args] + [f"{k}={_value(v)}" for k, v in node.kwargs.items()]
    target = f"call {node.target}" if node.op == "call_module" else _target(node.target)
    text = f"%{node.name} = {target}({', '.join(arguments)})"
    notes = [
        f"{word} {node.meta[key]}" for key, word in ((SITE, "site"), (ADAPTER, "adapter")) if key in node.meta
    ]
    return text + (f"  # {', '.join(notes)}" if notes else "")


def _attribute(module: fx.GraphModule, target: str) -> str:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    if not isinstance(value, Tensor):
        return ""
    dtype = DTYPES.get(value.dtype, str(value.dtype).removeprefix("torch."))
    return f" {dtype}[{'x'.join(map(str, value.shape))}]"


def _target(target: Any) -> str:
    if isinstance(target, OpOverload):
        return str(target).removesuffix(".default")
    return getattr(target, "__name__", str(target))


def _value(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return str(value)
