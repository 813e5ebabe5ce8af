"""Text from a graph with a cache, token by token: the same as transformers', padded batches too."""

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, MistralConfig

from spp_fx.exporters.onnx.onnxruntime_check import OnnxModel
from spp_fx.verbs.export import export
from tests.command import must
from tests.effort import nightly
from tests.exporters.onnx_files import greedy
from tests.families import FAMILIES, SMALL, VOCABULARY

pytestmark = pytest.mark.slow
NEW = 20
CONFIGS = {
    "gpt2": FAMILIES["gpt2"],
    "mixtral": FAMILIES["mixtral"],
    "mistral": lambda: MistralConfig(  # looks back over fewer tokens than there are
        **SMALL | {"num_hidden_layers": 1}, intermediate_size=64, num_key_value_heads=2, sliding_window=6
    ),
    "bloom": lambda: BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4),  # no positions
}


@pytest.mark.parametrize(
    ("family", "format_", "dtype"),
    [
        ("gpt2", "onnx", "float32"),
        ("bloom", "onnx-dense", "float32"),
        nightly("mixtral", "onnx-packed", "float32"),
        ("mistral", "onnx-packed", "float16"),
    ],
)
def test_a_padded_batch_goes_on_as_in_transformers(tmp_path, family, format_, dtype):
    torch.manual_seed(0)
    config = CONFIGS[family]()
    config.num_hidden_layers = 1
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    must("prune", tmp_path / "dense", "-o", tmp_path / "sparse")
    rounded_to = None if dtype == "float32" else dtype
    export(tmp_path / "sparse", tmp_path / "onnx", format_, with_past=True, dtype=rounded_to)
    casts = [
        node for node in onnx.load(tmp_path / "onnx" / "model.onnx").graph.node if node.op_type == "Cast"
    ]
    assert onnx.TensorProto.BFLOAT16 not in {
        node.attribute[0].i for node in casts
    }  # only Falcon rounds to it
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    found = greedy(tmp_path / "onnx" / "model.onnx", ids.numpy(), mask.numpy(), NEW)
    if dtype == "float32":
        np.testing.assert_array_equal(found, expected.numpy())
    else:  # half precision rounds otherwise in every kernel: hold the logits, given the same tokens
        with torch.no_grad():
            full = torch.cat([mask, torch.ones(2, NEW, dtype=torch.int64)], dim=1)
            positions = (full.cumsum(1) - 1).clamp(min=0)
            logits = model(expected, attention_mask=full, position_ids=positions).logits.float().numpy()
        ours = OnnxModel(tmp_path / "onnx" / "model.onnx").logits(expected.numpy(), full.numpy())
        real = full.numpy() == 1
        assert np.abs(ours.astype(np.float32) - logits)[real].max() < 2e-2 * np.abs(logits[real]).max()
