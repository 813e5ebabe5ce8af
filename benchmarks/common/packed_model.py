"""A Llama-shaped model that generates, its projections dense and packed."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from common import packing
from spp_fx.runtime.trust import make_weight

CONFIGS: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32},
}  # fmt: skip
VOCABULARY = 32000


def measure(
    size: str, layers: int, dtype: torch.dtype, batches: list[int], prompt: int, new: int, repeats: int,
    device: torch.device, sm: int,
) -> dict[str, Any]:  # fmt: skip
    """Tokens a second of reading a prompt and of generating, dense and in each packed form that runs."""
    torch.manual_seed(0)
    model = _dense(size, layers, dtype, device)
    report: dict[str, Any] = {
        "model": f"Llama {size}, {layers} layers, {str(dtype).removeprefix('torch.')}",
        "prompt_tokens": prompt,
        "new_tokens": new,
        "forms": {},
    }
    ids = torch.randint(VOCABULARY, (max(batches), prompt), device=device)
    expected: torch.Tensor | None = None
    linears = {n: m for n, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)}
    originals = {name: module.weight for name, module in linears.items()}
    for form in ("dense", *packing.FORMATS):
        found: dict[str, Any] = {}
        if form != "dense":
            library = packing.library(form, device)
            sites = [packing.packed_site(n, w.data, form, sm) for n, w in originals.items()]
            forms = packing.decide_quietly(sites, library)
            found["runs"] = {
                f: sum(x.form == f for x in forms.values()) for f in ("packed", "repacked", "dense")
            }
            found["reasons"] = sorted({each.reason for each in forms.values() if each.reason})
            if form == "cutlass" and not found["runs"]["packed"]:
                report["forms"][form] = found
                continue
            for site in sites:
                made = make_weight(site, forms[site.name].form, library)
                linears[site.name].weight = nn.Parameter(made, requires_grad=False)
        with torch.inference_mode():
            out = model(ids[:1]).logits.float()
            if expected is None:
                expected = out
            found["largest_logit"] = round(float(expected.abs().max()), 4)
            found["largest_logit_difference"] = round(float((out - expected).abs().max()), 6)
            found["tokens_per_second"] = {
                str(batch): _speeds(model, ids[:batch], new, repeats, device) for batch in batches
            }
        report["forms"][form if form == "dense" else packing.form_name(form, device)] = found
        for name, module in linears.items():
            module.weight = originals[name]
    return report


def _dense(size: str, layers: int, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    config = LlamaConfig(
        **CONFIGS[size], vocab_size=VOCABULARY, num_hidden_layers=layers, max_position_embeddings=4096
    )
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            packing.prune(module.weight.data)
    return model


def _speeds(
    model: PreTrainedModel, ids: torch.Tensor, new: int, repeats: int, device: torch.device
) -> dict[str, float]:
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    prefill = _seconds(lambda: model(ids), repeats, device)
    both = _seconds(lambda: model.generate(ids, attention_mask=mask, **settings), repeats, device)
    return {"prompt": round(ids.numel() / prefill, 1), "generated": round(len(ids) * new / both, 1)}


def _seconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    times: list[float] = []
    for turn in range(1 + repeats):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if turn:
            times.append(time.perf_counter() - start)
    return median(times)
