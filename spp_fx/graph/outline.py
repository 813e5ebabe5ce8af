"""A model that cannot be traced, as a program without graphs: the types of its modules give the sites."""

from collections.abc import Mapping

from torch import Tensor, fx, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spp_fx.graph.program import ROUTES, Kind, LeftOut, Program
from spp_fx.graph.task import Task
from spp_fx.graph.trace import head_of, tied_parameters

_ROUTER_WORDS = frozenset(("gate", "router"))


def outline(model: PreTrainedModel, reason: str) -> Program:
    """The sites of a model by the types of its modules, for work that needs no forward pass.

    `torch.nn.Linear`, transformers' `Conv1D` and its stacks of experts are sites. Every other parameter of two or
    more dimensions is named in `Program.left_out`.

    Args:
        model: on any device; its parameters are shared.
        reason: why it cannot be traced; calling the program raises it.
    """
    root = fx.GraphModule(nn.Module(), fx.Graph(), class_name="Outline")
    root._modules.update(model._modules)
    root._parameters.update(model._parameters)
    root._buffers.update(model._buffers)
    program = Program(root, Task(), (), model.config, None, tied_parameters(model), head_of(model))
    program.untraced = reason
    modules = dict(model.named_modules(remove_duplicate=False))
    embeddings = {f"{path}.weight" for path, module in modules.items() if isinstance(module, nn.Embedding)}
    for path, module in modules.items():
        for attribute, parameter in module._parameters.items():
            name = f"{path}.{attribute}".lstrip(".")
            if parameter is None or parameter.ndim < 2:
                continue
            kind = _kind(module, attribute, parameter)
            if name in embeddings:
                program.left_out[name] = LeftOut("is an embedding: its rows are looked up", known=True)
            elif kind is None:
                program.left_out[name] = LeftOut(_unknown(module), known=False)
            elif tower := _tower(model, path):
                outside = f"belongs to {tower}, which is not the language model"
                program.left_out[name] = LeftOut(outside, known=False)
            else:
                transposed = kind == "conv1d" or (kind == "experts" and bool(module.is_transposed))
                role = ROUTES if is_router(modules, path) else None
                program.sites[name] = program.make_site(
                    name, kind, transposed=transposed, embeddings=embeddings, role=role
                )
    return program


def _kind(module: nn.Module, attribute: str, parameter: Tensor) -> Kind | None:
    if isinstance(module, nn.Linear) and attribute == "weight":
        return "linear"
    if isinstance(module, Conv1D) and attribute == "weight":
        return "conv1d"
    # transformers marks the modules whose stacks its grouped products take.
    is_stack = parameter.ndim == 3 and isinstance(getattr(module, "is_transposed", None), bool)
    return "experts" if is_stack else None


def _unknown(module: nn.Module) -> str:
    if isinstance(module, nn.modules.conv._ConvNd):
        return "is the kernel of a convolution"
    return f"is a parameter of {type(module).__name__}, and only a trace shows what it does"


def is_router(modules: Mapping[str, nn.Module], path: str) -> bool:
    """Whether a linear has a router's name and stands beside the experts of its block."""
    words = path.split(".")
    if words[-1].rpartition("_")[2] in _ROUTER_WORDS:
        block = words[:-1]
    elif len(words) > 1 and words[-2] in _ROUTER_WORDS:
        block = words[:-2]
    else:
        return False
    return any(
        isinstance(child, nn.ModuleList)
        or any(p is not None and p.ndim == 3 for p in child._parameters.values())
        for child in modules[".".join(block)].children()
    )


def _tower(model: PreTrainedModel, path: str) -> str | None:
    """The part of a model of several modalities that a module belongs to, if it is not its language model."""
    if model.config.get_text_config() is model.config:
        return None
    language = model.get_decoder()
    inside = next((name for name, module in model.named_modules() if module is language), "")
    if not inside or path == inside or path.startswith(f"{inside}."):
        return None
    if model.get_output_embeddings() is model.get_submodule(path):
        return None
    return f"{path.rpartition('.')[0] or path}"
