import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from spp_fx.errors import FormatError, SppFxError, UsageError
from spp_fx.storage.folder import ModelFolder
from spp_fx.storage.safetensors import Shard, TensorInfo
from spp_fx.storage.writer import copy_others, rewrite_shard, write_shards

INDEX = "model.safetensors.index.json"


def state(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def refused(folder: Path, kind: type[SppFxError] = FormatError) -> str:
    with pytest.raises(kind) as caught:
        ModelFolder.open(folder)
    assert type(caught.value) is kind
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("form", ["single", "sharded"])
def test_holds_what_save_pretrained_wrote(
    form: str, llama: LlamaForCausalLM, request: pytest.FixtureRequest
) -> None:
    folder = ModelFolder.open(request.getfixturevalue(form))
    tensors = state(llama)
    assert folder.names == tuple(sorted(tensors))
    assert folder.config["hidden_size"] == 32
    assert folder.stored_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert folder.index == (INDEX if form == "sharded" else None)
    for name, tensor in tensors.items():
        shard, info = folder.info(name)
        assert info.shape == tuple(tensor.shape)
        assert shard.info(name) == info
        assert torch.equal(folder.read(name), tensor)
        assert torch.equal(folder.read_rows(name, 1, 3), tensor[1:3])
        assert torch.equal(torch.cat(list(folder.row_blocks(name, 500))), tensor)
    assert "lm_head.weight" in folder
    assert "lm_head.bias" not in folder
    with pytest.raises(UsageError, match=r"holds no tensor 'lm_head\.bias'"):
        folder.read("lm_head.bias")


def test_the_single_file_wins_over_an_index_as_in_transformers(
    sharded: Path, llama: LlamaForCausalLM
) -> None:
    save_file(
        {name: t + 1 for name, t in state(llama).items()}, sharded / "model.safetensors", {"format": "pt"}
    )
    folder = ModelFolder.open(sharded)
    assert folder.index is None
    assert [shard.name for shard in folder.shards] == ["model.safetensors"]
    loaded = LlamaForCausalLM.from_pretrained(sharded, dtype="auto")
    assert torch.equal(folder.read("lm_head.weight"), loaded.lm_head.weight)


def test_transformers_weights_of_the_config_come_first(single: Path, llama: LlamaForCausalLM) -> None:
    save_file(
        {name: t + 1 for name, t in state(llama).items()}, single / "other.safetensors", {"format": "pt"}
    )
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    loaded = LlamaForCausalLM.from_pretrained(single, dtype="auto")
    assert torch.equal(ModelFolder.open(single).read("lm_head.weight"), loaded.lm_head.weight)
    (single / "config.json").write_text(json.dumps(config | {"transformers_weights": "../other.safetensors"}))
    assert "leads out of the folder" in refused(single)
    (single / "config.json").write_text(json.dumps(config | {"transformers_weights": "weights.bin"}))
    assert "'weights.bin', not a weight file" in refused(single)


def test_one_file_of_another_name_is_taken_two_are_not(single: Path) -> None:
    (single / "model.safetensors").rename(single / "weights.safetensors")
    (single / "adapter_model.safetensors").write_bytes(b"not looked at")
    assert ModelFolder.open(single).shards[0].name == "weights.safetensors"
    shutil.copy(single / "weights.safetensors", single / "more.safetensors")
    assert "holds 2 .safetensors files" in refused(single)


def test_without_weights_config_is_enough(single: Path) -> None:
    (single / "model.safetensors").unlink()
    folder = ModelFolder.open(single, weights=False)
    assert folder.config["num_hidden_layers"] == 2
    assert folder.names == ()
    with pytest.raises(UsageError, match="opened without weights"):
        folder.fingerprint()
    assert "holds no weights; it needs model.safetensors" in refused(single, UsageError)


def test_shards_may_lie_in_a_folder_of_the_folder(sharded: Path) -> None:
    first = first_shard(sharded)
    before = ModelFolder.open(sharded)
    (sharded / "parts").mkdir()
    first.rename(sharded / "parts" / first.name)
    move = {first.name: f"parts/{first.name}"}
    edit_index(
        sharded, lambda i: i.update(weight_map={n: move.get(s, s) for n, s in i["weight_map"].items()})
    )
    after = ModelFolder.open(sharded)
    assert after.names == before.names
    assert f"parts/{first.name}" in [shard.name for shard in after.shards]


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "a/../../x.safetensors",
        "/etc/x.safetensors",
        "C:/x.safetensors",
        "..\\x.safetensors",
        "a\0.safetensors",
    ],
)
def test_an_index_cannot_lead_out_of_the_folder(name: str, sharded: Path) -> None:
    edit_index(sharded, lambda i: i["weight_map"].update({"lm_head.weight": name}))
    message = refused(sharded)
    assert "leads out of the folder" in message
    assert repr(name) in message


def test_missing_shards_are_named(sharded: Path) -> None:
    shard = first_shard(sharded)
    shard.unlink()
    message = refused(sharded)
    assert INDEX in message
    assert f"names 1 of {len(list(sharded.glob('*.safetensors'))) + 1} shards" in message
    assert repr(shard.name) in message


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    shard = first_shard(sharded)
    os.truncate(shard, shard.stat().st_size - 100)
    assert f"{shard}: truncated: 100 of" in refused(sharded)


def notes(folder: Path) -> str:
    return "\n".join(ModelFolder.open(folder).notes)


def loads_as_transformers_does(folder: Path) -> None:
    loaded = LlamaForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    opened = ModelFolder.open(folder)
    for name, tensor in loaded.items():
        assert torch.equal(opened.read(name), tensor), name


def test_a_folder_as_it_should_be_has_no_notes(single: Path, sharded: Path) -> None:
    assert ModelFolder.open(single).notes == ModelFolder.open(sharded).notes == ()


def place(folder: Path) -> tuple[str, str, str]:
    """A tensor, the shard that holds it (and others), and another shard."""
    weight_map: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    here = next(shard for shard in weight_map.values() if list(weight_map.values()).count(shard) > 1)
    name = next(name for name, shard in weight_map.items() if shard == here)
    return name, here, next(shard for shard in weight_map.values() if shard != here)


def test_a_name_of_the_index_that_no_shard_holds_is_noted(sharded: Path) -> None:
    _, here, _ = place(sharded)
    edit_index(sharded, lambda i: i["weight_map"].update(ghost=here))
    assert f"{INDEX}: names 1 tensor that no shard holds (first: 'ghost' in '{here}')" in notes(sharded)
    assert "ghost" not in ModelFolder.open(sharded)
    loads_as_transformers_does(sharded)


def test_a_tensor_that_the_index_places_elsewhere_is_read_from_where_it_is(sharded: Path) -> None:
    name, here, other = place(sharded)
    edit_index(sharded, lambda i: i["weight_map"].update({name: other}))
    assert f"places 1 tensor in the wrong shard (first: '{name}' in '{other}', which {here} holds)" in notes(
        sharded
    )
    loads_as_transformers_does(sharded)


def test_a_tensor_that_the_index_leaves_out_is_the_models(sharded: Path) -> None:
    name, here, _ = place(sharded)
    edit_index(sharded, lambda i: i["weight_map"].pop(name))
    assert f"does not name 1 tensor of its shards (first: '{name}' in {here})" in notes(sharded)
    loads_as_transformers_does(sharded)


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda i: i["metadata"].update(total_size=12345), "total_size is 12345"),
        (lambda i: i["metadata"].update(total_size="1 MB"), "total_size is '1 MB'"),
        (lambda i: i["metadata"].pop("total_size"), ""),
        (lambda i: i.pop("metadata"), "has no metadata, which transformers needs to load"),
        (lambda i: i.update(metadata=None), "has no metadata"),
    ],
)
def test_the_metadata_of_an_index_does_not_count(
    change: Callable[[dict[str, Any]], object], note: str, sharded: Path
) -> None:
    before = ModelFolder.open(sharded).names
    edit_index(sharded, change)
    assert note in notes(sharded)
    assert bool(notes(sharded)) == bool(note)
    assert ModelFolder.open(sharded).names == before


def test_a_weight_file_without_a_format_is_noted(single: Path) -> None:
    file = single / "model.safetensors"
    save_file(load_file(file), file)
    assert "1 weight file has no format in the metadata (first: 'model.safetensors')" in notes(single)
    loads_as_transformers_does(single)


@pytest.mark.parametrize("form", ["single", "sharded"])
def test_weight_files_that_transformers_ignores_are_named(form: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(form)
    save_file({"x": torch.zeros(1)}, folder / "stray.safetensors", {"format": "pt"})
    save_file({}, folder / "empty.safetensors", {"format": "pt"})
    save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors", {"format": "pt"})
    assert "1 weight file is left out, as in transformers" in notes(folder)
    assert "'stray.safetensors'" in notes(folder)
    assert "x" not in ModelFolder.open(folder)
    (folder / "stray.safetensors").write_bytes(b"damaged, and nobody reads it")
    assert "'stray.safetensors'" in notes(folder)
    loads_as_transformers_does(folder)


def copy_into_another_shard(
    folder: Path, change: Callable[[torch.Tensor], torch.Tensor] = torch.clone
) -> str:
    """Store the first tensor of a shard in another one too, changed; returns its name."""
    name, here, other = place(folder)
    copy = change(load_file(folder / here)[name])
    save_file(load_file(folder / other) | {name: copy}, folder / other, {"format": "pt"})
    return name


def test_a_tensor_that_is_stored_twice_in_equal_bytes_is_one(sharded: Path) -> None:
    before = ModelFolder.open(sharded)
    name = copy_into_another_shard(sharded)
    after = ModelFolder.open(sharded)
    assert f"1 tensor is stored in more than one shard, in equal bytes (first: '{name}' in" in notes(sharded)
    assert after.names == before.names
    assert after.stored_bytes == before.stored_bytes + before.info(name)[1].nbytes
    loads_as_transformers_does(sharded)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda t: torch.zeros(1), "different types (BF16"),
        (lambda t: t.float(), "different types (BF16"),
        (lambda t: t.flatten(), "different types (BF16"),
        (lambda t: t + 1, "different values"),
        (lambda t: t.view(torch.int16).bitwise_xor(1).view(torch.bfloat16), "different values"),
    ],
)
def test_two_copies_of_a_tensor_that_differ_are_refused(
    change: Callable[[torch.Tensor], torch.Tensor], difference: str, sharded: Path
) -> None:
    name = copy_into_another_shard(sharded, change)
    message = refused(sharded)
    assert f"tensor '{name}' is stored twice, in model-0000" in message
    assert difference in message


def test_copies_are_compared_block_by_block(tmp_path: Path) -> None:
    """The last byte of a tensor larger than a block, and one of no bytes at all."""
    (tmp_path / "config.json").write_text("{}")
    large = torch.zeros(4 * 2**20 + 5, dtype=torch.uint8)
    files = [f"model-{number}.safetensors" for number in (1, 2)]
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"a": files[0], "b": files[1]}}))
    for file in files:
        save_file({"a": large, "b": torch.zeros(0)}, tmp_path / file, {"format": "pt"})
    assert "2 tensors are stored in more than one shard" in notes(tmp_path)
    large[-1] = 1
    save_file({"a": large, "b": torch.zeros(0)}, tmp_path / files[1], {"format": "pt"})
    assert "'a' is stored twice" in refused(tmp_path)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": ["a"]}', "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "places tensor 'a' in 1, not a .safetensors file"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "in 'pytorch_model.bin', not a .safetensors file"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "the key 'a' occurs twice"),
    ],
)
def test_a_bad_index_is_refused(text: str, fault: str, sharded: Path) -> None:
    (sharded / INDEX).write_text(text)
    message = refused(sharded)
    assert INDEX in message
    assert fault in message


def test_pickled_weights_are_refused_with_the_way_out(single: Path) -> None:
    (single / "model.safetensors").unlink()
    (single / "pytorch_model.bin").write_bytes(b"")
    message = refused(single, UsageError)
    assert "only pickled weights (pytorch_model.bin)" in message
    assert "save_pretrained(" in message


def test_folders_that_are_no_models(tmp_path: Path, single: Path) -> None:
    assert "there is no such folder" in refused(tmp_path / "absent", UsageError)
    assert "is not a folder" in refused(single / "config.json", UsageError)
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused(tmp_path / "empty", UsageError)
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    assert "is an adapter folder" in refused(tmp_path / "empty", UsageError)
    (single / "config.json").write_text("{")
    assert "config.json: not valid JSON" in refused(single)
    (single / "config.json").write_text("[]")
    assert "config.json: holds [], expected a JSON object" in refused(single)
    (single / "config.json").unlink()
    os.mkfifo(single / "config.json")
    assert "not a regular file" in refused(single, UsageError)


def test_a_dangling_weight_link_is_named(single: Path) -> None:
    (single / "model.safetensors").unlink()
    (single / "model.safetensors").symlink_to("gone")
    assert "model.safetensors: is not a file (a dangling link?)" in refused(single)


def test_fingerprints_tell_models_apart(single: Path, sharded: Path) -> None:
    fingerprint = ModelFolder.open(single).fingerprint()
    assert len(bytes.fromhex(fingerprint)) == 32
    assert fingerprint == ModelFolder.open(single).fingerprint()
    assert fingerprint != ModelFolder.open(sharded).fingerprint()  # another layout of the same model
    content = bytearray((single / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (single / "model.safetensors").write_bytes(content)
    assert ModelFolder.open(single).fingerprint() != fingerprint


def test_a_fingerprint_reads_a_sample_of_a_large_file(tmp_path: Path) -> None:
    """All of 18 blocks or less; beyond that the first, the last and 16 between."""
    (tmp_path / "config.json").write_text("{}")

    def fingerprint(size: int, *ones: int) -> str:
        data = torch.zeros(size, dtype=torch.uint8)
        data[list(ones)] = 1
        save_file({"a": data}, tmp_path / "model.safetensors")
        return ModelFolder.open(tmp_path).fingerprint()

    small, large = 18 * 4096, 200 * 4096
    assert len({fingerprint(small, i) for i in range(0, small, 4096)} | {fingerprint(small)}) == 19
    last = large - 4096
    starts = [last * i // 17 for i in range(18)]
    sampled = [fingerprint(large, at) for start in starts for at in (start, start + 4095)]
    assert len({fingerprint(large), *sampled}) == 37
    assert fingerprint(large, starts[1] - 1) == fingerprint(large)  # an identity, not a proof


def test_other_files_are_what_a_copy_takes_along(single: Path) -> None:
    taken = ["README.md", "tokenizer.json", "chat_template.jinja", "assets/logo.png", ".gitattributes"]
    left = [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "optimizer.pt",
        "original/consolidated.00.pth",
        "consolidated.safetensors",
        INDEX,
        "tf_model.h5",
        "onnx/model.onnx",
        "model.Q4_K_M.gguf",
        ".git/config",
        ".cache/huggingface/x.json",
        "__pycache__/a.pyc",
        ".DS_Store",
    ]
    for name in taken + left:
        (single / name).parent.mkdir(exist_ok=True, parents=True)
        (single / name).write_text("x")
    found = [path.as_posix() for path in ModelFolder.open(single).other_files()]
    assert found == sorted(found)
    assert set(found) == {*taken, "config.json", "generation_config.json"}


def test_other_files_are_files(single: Path) -> None:
    link = single / "tokenizer.json"
    link.symlink_to("absent")
    with pytest.raises(FormatError, match="dangling"):
        ModelFolder.open(single).other_files()
    link.unlink()
    os.mkfifo(link)
    with pytest.raises(FormatError, match="not a regular file"):
        ModelFolder.open(single).other_files()


def test_an_adapter_of_peft_beside_a_model_is_noted_and_not_taken_along(single: Path) -> None:
    (single / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    (single / "adapter_model.safetensors").write_bytes(b"not looked at")
    (single / "extra").mkdir()
    (single / "extra" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    (single / "extra" / "README.md").write_text("of the adapter")
    folder = ModelFolder.open(single)
    assert [path.as_posix() for path in folder.other_files()] == ["config.json", "generation_config.json"]
    (note,) = folder.notes
    assert "adapter_config.json: a PEFT adapter (LORA) is in the model's folder" in note
    (single / "model.safetensors").unlink()
    assert "is a PEFT adapter (LORA)" in refused(single, UsageError)


@pytest.mark.parametrize("form", ["single", "sharded"])
def test_a_rewritten_model_is_the_model_with_some_tensors_changed(
    form: str, llama: LlamaForCausalLM, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = ModelFolder.open(request.getfixturevalue(form))
    (source.path / "assets").mkdir()
    (source.path / "assets" / "note.txt").write_text("x")
    (source.path / "README.md").write_text("of the base")
    before = {path: path.read_bytes() for path in source.path.rglob("*") if path.is_file()}

    def double(shard: Shard, info: TensorInfo) -> torch.Tensor | None:
        return shard.read(info.name) * 2 if info.name.endswith("q_proj.weight") else None

    target = tmp_path / "out"
    target.mkdir()

    def write(shard: Shard, file: Path) -> dict[str, int]:
        rewrite_shard(shard, file, lambda info: double(shard, info))
        return {"tensors": len(shard.header.tensors)}

    copy_others(source, target, skip=["README.md"])
    written = write_shards(source, target, write)
    assert [facts["tensors"] for facts in written] == [len(shard.header.tensors) for shard in source.shards]
    assert {path: path.read_bytes() for path in source.path.rglob("*") if path.is_file()} == before
    relative = {path.relative_to(target) for path in target.rglob("*") if path.is_file()}
    assert relative == {path.relative_to(source.path) for path in before} - {Path("README.md")}
    loaded = LlamaForCausalLM.from_pretrained(target, dtype="auto").state_dict()
    for name, tensor in state(llama).items():
        assert torch.equal(loaded[name], tensor * 2 if name.endswith("q_proj.weight") else tensor)
