"""Small artifacts of every kind that `verify` reads, made once; each case damages a copy of one."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from spp_fx.exporters.manifest import Part, TensorRecord, write_manifest
from spp_fx.exporters.onnx.encodings import DenseConstants, Encoding, PackedCodes, SparseInitializers
from spp_fx.exporters.onnx.graph_parameters import GraphParameter
from spp_fx.exporters.onnx.graph_writer import graph_writer, onnx_type
from spp_fx.sparsity.lock import LOCK_NAME, Lock, make_entry
from spp_fx.sparsity.pattern import parse_pattern
from spp_fx.sparsity.scan import pack_mask
from spp_fx.verbs.export import export
from spp_fx.verbs.inject import inject
from spp_fx.version import VERSION

WIDTH = 64
"""The smallest that cuSPARSELt's layout of sm90 takes."""
TRANSPOSED = ("turned",)


@dataclass(frozen=True)
class Seed:
    """An undamaged artifact.

    Attributes:
        kind: its name.
        root: the folder that a case copies as a whole.
        target: what is verified, below root.
        reader: how `plain` reads it.
    """

    kind: str
    root: Path
    target: str
    reader: str

    @property
    def lock(self) -> Path:
        """The lock of the undamaged artifact, which no case touches."""
        return self.root.with_name(f"{self.root.name}.lock.json")

    def at(self, copy: Path) -> "Seed":
        """The same artifact in a copy of its folder."""
        return replace(self, root=copy)

    @property
    def path(self) -> Path:
        return self.root / self.target


def build(folder: Path, graphs: bool = True) -> dict[str, Seed]:
    """Every artifact, below a new folder.

    Args:
        graphs: export a model's own ONNX graph as well, which takes some seconds of tracing.
    """
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    model = _model(folder / "model" / "model")
    seeds = [Seed("model", folder / "model", "model", "folder")]
    for kind, make, target, reader in (
        ("sharded", _sharded, "model", "folder"),
        ("lone", _lone, "weights.safetensors", "file"),
        ("odd", _odd, "model", "folder"),
        ("adapter", _adapter, "model-spp", "adapter"),
        ("legacy", _legacy, "model", "legacy"),
        *[(name, _exporter(name), "export", reader) for name, reader in _EXPORTS.items()],
        *[(name, _onnx(name), "export", "onnx") for name in _GRAPHS],
        ("lone-onnx", _lone_onnx, "model.onnx", "graph"),
    ):
        (folder / kind).mkdir()
        make(model, folder / kind)
        seeds.append(Seed(kind, folder / kind, target, reader))
    if graphs:
        (folder / "model-onnx").mkdir()
        export(model, folder / "model-onnx" / "export", "onnx-packed", compare_logits=False)
        seeds.append(Seed("model-onnx", folder / "model-onnx", "export", "onnx"))
    for seed in seeds:
        shutil.copy(next(iter(sorted(seed.root.rglob(LOCK_NAME)))), seed.lock)
    return {seed.kind: seed for seed in seeds}


_EXPORTS = {
    "safetensors": "folder",
    "cusparselt": "packed",
    "cutlass": "packed",
    "sparse-bitmask": "bitmask",
}
_GRAPHS = ("onnx", "onnx-packed", "onnx-dense", "onnx-external")


def _prune(weight: Tensor, transposed: bool = False) -> Tensor:
    """2:4 along the input dimension, exactly two of every four kept, none of them zero."""
    canonical = (weight.transpose(-1, -2) if transposed else weight).clone()
    groups = canonical.reshape(-1, 4)
    groups[groups == 0] = 1
    order = torch.rand(groups.shape, generator=torch.Generator().manual_seed(0)).argsort(1)
    groups.scatter_(1, order[:, :2], 0)
    pruned = groups.reshape(canonical.shape)
    return (pruned.transpose(-1, -2) if transposed else pruned).contiguous()


def _lock(weights: Mapping[str, Tensor]) -> Lock:
    """A lock of 2:4 weights; those named in TRANSPOSED are stored (in, out), 3-D ones are experts."""

    def entry(name: str, weight: Tensor):
        turned = any(word in name for word in TRANSPOSED)
        kind = "experts" if weight.ndim == 3 else "conv1d" if turned else "linear"
        return make_entry(name, kind, pack_mask(weight, turned), parse_pattern("2:4"), turned)

    return Lock.of(entry(name, weight) for name, weight in weights.items())


def _is_site(name: str) -> bool:
    return "_proj" in name


def _model(folder: Path) -> Path:
    """A Llama of one layer in float16, its lock beside it."""
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights = {name: _prune(w) if _is_site(name) else w for name, w in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / LOCK_NAME).write_text(_lock({n: w for n, w in weights.items() if _is_site(n)}).dumps())
    return folder


def _sharded(model: Path, folder: Path) -> None:
    target = shutil.copytree(model, folder / "model")
    weights = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    index: dict[str, str] = {}
    for number in range(3):
        file = f"model-0000{number + 1}-of-00003.safetensors"
        part = {name: weights[name] for name in sorted(weights)[number::3]}
        save_file(part, target / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    size = sum(weight.nbytes for weight in weights.values())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=2)
    (target / "model.safetensors.index.json").write_text(text)


def _numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int, transposed: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(1, 9, shape, generator=generator).float()
    weight *= torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return _prune(weight, transposed).to(dtype)


def _lone(model: Path, folder: Path) -> None:
    """One file without a model: six dtypes, matrices whose rows do not end on whole bytes of mask."""
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8)
    sites = {f"w{i}.weight": _numbers((5, 12), dtype, i) for i, dtype in enumerate(dtypes)}
    save_file(sites | {"norm.bias": torch.ones(7)}, folder / "weights.safetensors")
    (folder / LOCK_NAME).write_text(_lock(sites).dumps())


def _odd(model: Path, folder: Path) -> None:
    """A folder with a stack of experts, weights stored (in, out) and small floats; no model can be traced."""
    target = folder / "model"
    target.mkdir()
    sites = {
        "experts.gate_up": _numbers((3, 8, 16), torch.bfloat16, 1),
        "experts.turned": _numbers((3, 16, 8), torch.float32, 2, transposed=True),
        "h.turned.weight": _numbers((12, 5), torch.float16, 3, transposed=True),
        "h.plain.weight": _numbers((5, 12), torch.float64, 4),
        "h.small.weight": _numbers((8, 8), torch.float8_e5m2, 5),
    }
    save_file(sites | {"h.bias": torch.zeros(3)}, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text('{"model_type": "none"}\n')
    (target / LOCK_NAME).write_text(_lock(sites).dumps())


def _adapter(model: Path, folder: Path) -> None:
    """An adapter, its factors random, over the copy of its base that lies beside it."""
    inject(shutil.copytree(model, folder / "model"), folder / "model-spp", rank=4)
    path = folder / "model-spp" / "adapter_model.safetensors"
    factors = {name: torch.randn_like(value) * 0.1 for name, value in load_file(path).items()}
    save_file(factors, path, {"format": "pt"})
    config = folder / "model-spp" / "adapter_config.json"
    data = json.loads(config.read_text()) | {"base_model_name_or_path": "/nowhere/model"}
    config.write_text(json.dumps(data, indent=2))


def _legacy(model: Path, folder: Path) -> None:
    """compressed-tensors' dropped format."""
    target = shutil.copytree(model, folder / "model")
    stored: dict[str, Tensor] = {}
    for name, weight in load_file(target / "model.safetensors").items():
        if not _is_site(name):
            stored[name] = weight
            continue
        kept = weight != 0
        layer = name.removesuffix(".weight")
        bits = (kept.reshape(len(weight), -1, 8) * (1 << torch.arange(8))).sum(-1)
        stored |= {
            f"{layer}.shape": torch.tensor([[len(weight)], [weight.shape[1]]]),
            f"{layer}.compressed": weight[kept].reshape(len(weight), -1),
            f"{layer}.bitmask": bits.to(torch.uint8),
        }
    save_file(stored, target / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "sparsity_config": {"format": "sparse-24-bitmask"},
    }
    (target / "config.json").write_text(json.dumps(config))


def _exporter(format: str) -> Callable[[Path, Path], None]:
    def make(model: Path, folder: Path) -> None:
        options = {"sm": 90} if format == "cusparselt" else {}
        export(model, folder / "export", format, **options)

    return make


def _onnx(name: str) -> Callable[[Path, Path], None]:
    """An export of three weights in a graph of three products."""

    def make(model: Path, folder: Path) -> None:
        target = folder / "export"
        target.mkdir()
        shutil.copy(model / "config.json", target)
        format = "onnx" if name == "onnx-external" else name
        lock, records = _write_graph(target / "model.onnx", format, external=name == "onnx-external")
        (target / LOCK_NAME).write_text(lock.dumps())
        write_manifest(
            target,
            spp_fx_version=VERSION,
            format=format,
            pattern=lock.pattern,
            requirements={},
            sizes={},
            tensors=records,
        )

    return make


def _lone_onnx(model: Path, folder: Path) -> None:
    """A graph with sparse, packed and dense weights, without a manifest."""
    lock, _ = _write_graph(folder / "model.onnx", "mixed", external=False)
    (folder / LOCK_NAME).write_text(lock.dumps())


def _write_graph(path: Path, format: str, *, external: bool) -> tuple[Lock, list[TensorRecord]]:
    size = 32 if external else 16  # large enough not to stay in the graph
    weights = {f"layers.{i}.w": _numbers((size, size), torch.float32, i) for i in range(3)}
    nodes = []
    for i, name in enumerate(weights):
        nodes.append(helper.make_node("Transpose", [name], [f"t{i}"], perm=[1, 0]))
        nodes.append(helper.make_node("MatMul", [f"x{i}", f"t{i}"], [f"x{i + 1}"]))
    ends = [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["n", size]) for x in ("x0", "x3")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    encodings: dict[str, Encoding] = {
        "onnx": SparseInitializers("smallest"),
        "onnx-packed": PackedCodes(),
        "onnx-dense": DenseConstants(),
    }
    names = list(encodings) if format == "mixed" else [format] * 3
    lock, records = _lock(weights), []
    with graph_writer(proto, path, single_file_limit=-1 if external else None) as writer:
        for entry, choice in zip(lock.sites, names, strict=True):
            weight = weights[entry.name]
            entries = ((entry, Part(initializer=entry.name)),)
            parameter = GraphParameter(
                entry.name, tuple(weight.shape), onnx_type(weight.dtype), entries, whole=True
            )
            done = encodings[choice].encode(parameter, weight, writer)
            part = Part(initializer=entry.name, swapped=True) if done.swapped else None
            records.append(
                TensorRecord(name=entry.name, shape=[size, size], dtype="F32", layout=done.layout, part=part)
            )
        proto.graph.initializer.extend(encodings["onnx-packed"].constants())
    return lock, records
