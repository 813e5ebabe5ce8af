"""Names that generated code cannot use, such as a module called `in` or `self`, and the ways round them."""

import builtins
import keyword
import re
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from spp_fx.errors import SppFxError

# Local names that generated code cannot use: `self`, Python's own, and the globals that fx defines.
_TAKEN = {"self", *keyword.kwlist, *dir(builtins)} | {
    *("torch", "device", "inf", "nan", "NoneType", "pytree", "fx_pytree")
}
_KEYWORD_ATTRIBUTE = re.compile(rf"(?<=[\w)])\.({'|'.join(keyword.kwlist)})\b")


def spell(graph: fx.Graph) -> fx.Graph:
    """Rename nodes whose names generated code cannot use, and return the graph.

    A module called `self` (RoBERTa's attention) makes a node of that name, and `self = self.self(x)` hides the
    module from the code after it. Names of modules and parameters stay: those that are Python keywords, which a
    ModuleDict allows, are read by `__getattr__`. Unpickling traces the generated code, and calls this again.
    """
    for node in graph.nodes:
        if node.name in _TAKEN:
            node._rename(f"{node.name}_1")
        if node.op == "placeholder" and node.target in _TAKEN:
            node.target = node.name
    graph.on_generate_code(lambda _: _spell_keywords)
    graph._tracer_cls = Tracer
    return graph


class Tracer(fx.Tracer):
    """Reads the generated code of a pickled graph."""

    def trace(self, *args: Any, **kwargs: Any) -> fx.Graph:
        return spell(super().trace(*args, **kwargs))


def _spell_keywords(code: list[str]) -> list[str]:
    return [_KEYWORD_ATTRIBUTE.sub(r'.__getattr__("\1")', line) for line in code]


# Attributes that torch.fx and torch.export.unflatten give each graph module, so that no child can have them.
_KEPT = {*dir(fx.GraphModule(nn.Module(), fx.Graph())), "graph_module", "arg_names"}


def refuse_names(model: nn.Module) -> None:
    """SppFxError if a module, parameter or buffer has the name of an attribute of every graph module."""
    for path, module in model.named_modules():
        for name in (*module._modules, *module._parameters, *module._buffers):
            if name in _KEPT:
                raise SppFxError(
                    f"{type(model).__name__} cannot be traced: torch.fx keeps the name '{name}' for itself, and "
                    f"{f'{path}.{name}'.lstrip('.')} has it; rename it in the model's code and weights"
                )


_HIDDEN = "__is_a_keyword"


def hide_keywords(exported: ExportedProgram) -> None:
    """Rename modules and parameters of an exported program whose names are Python keywords; `shown` undoes it.

    torch.export.unflatten generates code, and `self.in(x)` is not valid.
    """
    names = {part for name in exported.state_dict for part in name.split(".")}
    for node in exported.graph.nodes:
        stack = node.meta.get("nn_module_stack", {})
        names |= {part for path, _ in stack.values() for part in path.split(".")}
    if not any(map(keyword.iskeyword, names)):
        return
    for node in exported.graph.nodes:
        if "nn_module_stack" in node.meta:
            stack = node.meta["nn_module_stack"]
            node.meta["nn_module_stack"] = {key: (_hidden(path), kind) for key, (path, kind) in stack.items()}
    signature = exported.graph_signature
    for spec in (*signature.input_specs, *signature.output_specs):
        spec.target = spec.target and _hidden(spec.target)
    for entry in exported.module_call_graph:
        entry.fqn = _hidden(entry.fqn)
    for table in (exported.state_dict, exported.constants):
        for name in list(table):
            table[_hidden(name)] = table.pop(name)


def _hidden(path: str) -> str:
    return ".".join(part + _HIDDEN if keyword.iskeyword(part) else part for part in path.split("."))


def shown(path: str) -> str:
    """The model's own path for one that `hide_keywords` may have renamed."""
    return path.replace(_HIDDEN, "")
