import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

Put = Callable[..., Path]


def _put(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


@pytest.fixture(scope="session")
def put() -> Put:
    """Writes a file with this header (an object, or its JSON text) and this data, however wrong."""
    return _put


@pytest.fixture(scope="session")
def llama() -> LlamaForCausalLM:
    """A random Llama of about 90 KB in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


@pytest.fixture
def single(llama: LlamaForCausalLM, tmp_path: Path) -> Path:
    """The model as one file."""
    llama.save_pretrained(tmp_path / "single")
    return tmp_path / "single"


@pytest.fixture
def sharded(llama: LlamaForCausalLM, tmp_path: Path) -> Path:
    """The model as several shards and an index."""
    llama.save_pretrained(tmp_path / "sharded", max_shard_size="16KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) >= 3
    return tmp_path / "sharded"
