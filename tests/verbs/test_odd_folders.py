"""Folders as people have them: odd indexes, tensors stored twice, links, adapters of PEFT; verb by verb."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from spp_fx.errors import FormatError, UsageError
from spp_fx.exporters.onnx.encodings import SparseInitializers
from spp_fx.graph import model as ir_model
from spp_fx.graph.model import load_model
from spp_fx.sparsity.lock import load_lock
from spp_fx.verbs.verify import verify
from tests.command import command, listing, must, one_line, randomize
from tests.exporters.onnx_files import two_of_four, write_weight

Q = "model.layers.0.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"


def holder(folder: Path, name: str) -> Path:
    return next(path for path in sorted(folder.glob("model-*")) if name in load_file(path))


def duplicate(folder: Path, name: str = Q) -> tuple[Path, Path]:
    """Store a tensor in a second shard; returns both files."""
    first = holder(folder, name)
    second = max(path for path in folder.glob("model-*.safetensors") if path != first)
    save_file(load_file(second) | {name: load_file(first)[name]}, second, {"format": "pt"})
    return first, second


def copies(folder: Path, name: str = Q) -> list[torch.Tensor]:
    files = [load_file(path) for path in sorted(folder.glob("model-*.safetensors"))]
    return [file[name] for file in files if name in file]


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def edit_index(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def edit(path: Path, change) -> None:
    values = load_file(path)
    change(values)
    save_file(values, path, {"format": "pt"})


# Stored twice


def test_a_site_that_is_stored_twice_is_pruned_in_both_copies(world):
    duplicate(world / "shards")
    ran = must("prune", world / "shards", "-o", world / "new", "--json")
    assert f"1 tensor is stored in more than one shard, in equal bytes (first: '{Q}'" in ran.err
    one, other = copies(world / "new")
    assert torch.equal(one, other)
    assert int((one.view(-1, 4) != 0).sum(-1).max()) == 2
    assert [entry.name for entry in load_lock(world / "new" / "sparsity.lock.json").sites].count(Q) == 1
    assert torch.equal(loaded(world / "new")[Q], one)
    must("verify", world / "new", "--pattern", "2:4", "--coverage", "all")


@pytest.mark.parametrize("options", [[], ["--no-verify-sparsity", "--vanish", "allow"]])
def test_a_site_that_is_stored_twice_is_folded_in_both_copies(world, options):
    before = copies(world / "sharded")
    duplicate(world / "sharded")
    said = must("inject", world / "sharded", "-o", world / "many", "--rank", 4).err
    assert "is stored in more than one shard" in said
    randomize(world / "many")
    ran = must("merge", world / "many", "-o", world / "new", *options, "--json")
    assert "is stored in more than one shard" in ran.err
    assert [site["name"] for site in ran.json["sites"]].count(Q) == 1
    one, other = copies(world / "new")
    assert torch.equal(one, other)
    assert not torch.equal(one, before[0])
    assert torch.equal(loaded(world / "new")[Q], one)
    assert [entry.name for entry in load_lock(world / "new" / "sparsity.lock.json").sites].count(Q) == 1
    must("verify", world / "new", "--against", world / "sharded")


def test_a_second_copy_that_is_damaged_fails_the_gate(world):
    first, second = duplicate(world / "sharded")
    must("verify", world / "sharded")

    def spoil(values):
        values[Q].view(-1)[0] += 1

    for file in (first, second):
        whole = file.read_bytes()
        edit(file, spoil)
        ran = command("verify", world / "sharded", "--pattern", "2:4", "--json")
        assert ran.code == 1
        (problem,) = ran.json["problems"]
        assert f"tensor '{Q}' is stored twice, in {first.name} and {second.name}" in problem
        assert command("prune", world / "sharded", "-o", world / "new").code == 1
        file.write_bytes(whole)


def test_each_file_of_a_folder_with_copies_is_held_to_the_lock(world):
    first, second = duplicate(world / "sharded")
    for file in (first, second):
        sites = must("verify", file, "--json").json["sites"]
        assert Q in [site["name"] for site in sites]


@pytest.mark.parametrize("format", ["safetensors", "sparse-bitmask", "cusparselt"])
def test_a_model_with_copies_goes_through_an_export_and_back(world, format):
    duplicate(world / "sharded")
    duplicate(world / "sharded", "model.norm.weight")
    must("export", world / "sharded", "-o", world / "new", "--format", format)
    must("verify", world / "new", "--against", world / "sharded")
    must("unpack", world / "new", "-o", world / "back")
    expected = loaded(world / "sharded")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded(world / "back").items())
    if format != "cusparselt":
        names = [path.name for path in (world / "sharded").glob("model*")]
        assert {n: (world / "back" / n).read_bytes() for n in names} == {
            n: (world / "sharded" / n).read_bytes() for n in names
        }


# Odd indexes


def leave_out(folder: Path) -> str:
    edit_index(folder, lambda i: i["weight_map"].pop(Q))
    return "does not name 1 tensor of its shards"


def add_a_buffer(folder: Path) -> str:
    edit(min(folder.glob("model-*")), lambda v: v.update({"model.rotary_emb.inv_freq": torch.ones(4)}))
    return "does not name 1 tensor of its shards"


def name_a_ghost(folder: Path) -> str:
    edit_index(folder, lambda i: i["weight_map"].update({"model.mtp.fc.weight": i["weight_map"][Q]}))
    return "names 1 tensor that no shard holds"


def misplace(folder: Path) -> str:
    edit_index(
        folder,
        lambda i: i["weight_map"].update(
            {Q: next(s for s in i["weight_map"].values() if s != i["weight_map"][Q])}
        ),
    )
    return "places 1 tensor in the wrong shard"


def miscount(folder: Path) -> str:
    edit_index(folder, lambda i: i["metadata"].update(total_size=12345))
    return "total_size is 12345"


@pytest.mark.parametrize("spoil", [leave_out, add_a_buffer, name_a_ghost, misplace, miscount])
def test_an_odd_index_is_told_by_verify_and_changes_nothing(world, spoil):
    before = loaded(world / "sharded")
    note = spoil(world / "sharded")
    verdict = must("verify", world / "sharded", "--json")
    assert note in verdict.err
    assert note in "".join(verdict.json["notes"])
    after = loaded(world / "sharded")
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_an_odd_index_is_told_by_every_verb_that_reads_it(world):
    told = [spoil(world / "sharded") for spoil in (name_a_ghost, miscount, leave_out)]
    inspected = must("inspect", world / "sharded", "--json")
    assert all(note in "".join(inspected.json["notes"]) for note in told)
    for words in (
        ["prune", world / "sharded", "-o", world / "new", "--pattern", "2:4"],
        ["inject", world / "sharded", "-o", world / "many", "--rank", 4],
        ["merge", world / "many", "-o", world / "both"],
        ["export", world / "both", "-o", world / "out", "--format", "sparse-bitmask"],
        ["lock", world / "sharded", "--force"],
    ):
        said = must(*words, "--json").err
        assert [said.count(note) for note in told] == [1, 1, 1], words
    expected, found = loaded(world / "sharded"), loaded(world / "new")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_folder_as_it_should_be_is_told_nothing(world):
    verdict = must("verify", world / "sharded", "--json")
    assert verdict.err == ""
    assert "notes" not in verdict.json


def test_an_index_name_that_the_model_needs_is_still_missed(world):
    holding = holder(world / "sharded", Q)
    edit(holding, lambda values: values.pop(Q))
    ran = command("verify", world / "sharded", "--pattern", "2:4")
    assert ran.code == 1
    assert f"FAIL {Q}" in ran.out
    with pytest.raises(FormatError, match="lacks 1 of the model's tensors"):
        load_model(world / "sharded")


# Links


def hub(folder: Path, cache: Path) -> Path:
    """A snapshot of the Hugging Face cache."""
    snapshot, blobs = cache / "models--a--b" / "snapshots" / "0123abc", cache / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    return snapshot


def folder_of_links(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).symlink_to(file)
    return target


def without_lock(folder: Path) -> Path:
    for name in ("sparsity.lock.json", "sparsity.provenance.json"):
        (folder / name).unlink()
    return folder


@pytest.mark.parametrize("kind", ["snapshot", "links into a cache", "links, allowed"])
def test_weights_that_are_links_are_locked_verified_and_exported(world, tmp_path, kind):
    snapshot = hub(without_lock(world / "sharded"), tmp_path / "hub")
    allow: list[str] = []
    if kind == "snapshot":
        folder = snapshot
    elif kind == "links into a cache":
        folder = folder_of_links(snapshot, tmp_path / "own")
    else:
        folder, allow = folder_of_links(world / "sharded", tmp_path / "own"), ["--allow-links"]
    must("lock", folder, *allow)
    assert not (folder / "sparsity.lock.json").is_symlink()
    must("verify", folder, *allow)
    must("export", folder, "-o", world / "out", "--format", "safetensors", *allow)
    assert not [path for path in (world / "out").rglob("*") if path.is_symlink()]


def test_what_is_made_of_links_is_made_of_files(world, tmp_path):
    folder = folder_of_links(world / "sharded", tmp_path / "own")
    must("prune", folder, "-o", world / "new", "--allow-links")
    must("inject", folder, "-o", world / "many", "--rank", 4, "--allow-links")
    must("merge", world / "many", "-o", world / "both", "--allow-links")
    for out in ("new", "many", "both"):
        assert not [path for path in (world / out).rglob("*") if path.is_symlink()]
    assert {path.name for path in (world / "new").iterdir()} == {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    "words",
    [
        "verify own --pattern 2:4",
        "lock own",
        "inspect own",
        "prune own -o new",
        "inject own -o new",
        "inject own -o new --dry-run",
        "export own -o new --format safetensors",
        "merge adapter -o new --base own",
        "eval own --data text.txt",
        "opt own -p canonicalize",
    ],
)
def test_weights_that_are_links_to_elsewhere_are_refused_with_the_option(world, monkeypatch, words):
    monkeypatch.chdir(world)
    folder_of_links(without_lock(world / "sparse"), world / "own")
    before = listing(world)
    ran = command(*words.split())
    assert ran.code == 1
    assert "allow it with --allow-links" in one_line(ran.err)
    assert listing(world) == before


def test_the_keyword_of_the_verbs_allows_links_for_one_call(world):
    own = folder_of_links(world / "sparse", world / "own")
    assert verify(own, allow_links=True).ok
    with pytest.raises(FormatError, match="allow_links=True"):
        verify(own)


@pytest.mark.parametrize("place", ["same folder", "hub cache", "elsewhere"])
def test_external_data_of_an_onnx_file_may_be_a_link(tmp_path, place):
    made = tmp_path / "made"
    made.mkdir()
    write_weight(made / "m.onnx", two_of_four((64, 64)), SparseInitializers("int64"), external=True)
    if place == "hub cache":
        folder = hub(made, tmp_path / "hub")
    elif place == "elsewhere":
        folder = folder_of_links(made, tmp_path / "own")
    else:
        folder = made
        (made / "m.onnx.data").rename(made / "data.bin")
        (made / "m.onnx.data").symlink_to("data.bin")
    ran = command("verify", folder / "m.onnx", "--pattern", "2:4")
    assert ran.code == (1 if place == "elsewhere" else 0), ran
    if place == "elsewhere":
        assert "--allow-links" in ran.out + ran.err
        must("verify", folder / "m.onnx", "--pattern", "2:4", "--allow-links")


# Adapters of PEFT


def peft_config(kind: str, **fields: object) -> str:
    return json.dumps(
        {"peft_type": kind, "base_model_name_or_path": "org/base", "task_type": "CAUSAL_LM"} | fields
    )


def peft(folder: Path, kind: str = "LORA", **fields: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(peft_config(kind, **fields))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.ones(2, 32)}, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


VERBS = [
    "verify peft",
    "verify peft --pattern 2:4",
    "merge peft -o new",
    "train peft --data text.txt",
    "eval peft --data text.txt",
    "inject peft -o new",
    "export peft -o new --format safetensors",
    "lock peft",
    "prune peft -o new",
    "inspect peft",
]


@pytest.mark.parametrize("words", VERBS)
@pytest.mark.parametrize("with_config", [False, True], ids=["alone", "with the base's config.json"])
def test_an_adapter_of_peft_is_named_by_every_verb(world, monkeypatch, words, with_config):
    monkeypatch.chdir(world)
    peft(world / "peft", r=8, lora_alpha=16, target_modules=["q_proj"])
    if with_config:
        shutil.copy(world / "sparse" / "config.json", world / "peft")
    before = listing(world)
    ran = command(*words.split())
    assert ran.code in (1, 2)
    said = one_line(ran.err)
    assert "is a PEFT adapter (LORA) for the base model 'org/base'" in said
    assert "merge_and_unload" in said
    assert "format_version" not in said
    assert listing(world) == before


@pytest.mark.parametrize(
    ("kind", "fix"),
    [
        ("ADALORA", "merge_and_unload"),
        ("NEXT_YEARS", "merge_and_unload"),
        ("PROMPT_TUNING", "use spp-fx on the base model's folder"),
        ("PREFIX_TUNING", "use spp-fx on the base model's folder"),
    ],
)
def test_an_adapter_of_peft_comes_with_what_to_do(tmp_path, kind, fix):
    with pytest.raises(UsageError) as caught:
        verify(peft(tmp_path / "peft", kind))
    assert f"is a PEFT adapter ({kind})" in str(caught.value)
    assert fix in str(caught.value)


def test_a_model_with_an_adapter_of_peft_beside_it_is_a_model(world, monkeypatch):
    monkeypatch.chdir(world)
    peft(world / "sparse")
    ran = must("verify", "sparse", "--json")
    assert ran.json["kind"] == "model"
    assert "a PEFT adapter (LORA) is in the model's folder" in "".join(ran.json["notes"])
    must("lock", "sparse", "--force")
    for words in (
        "prune sparse -o new",
        "merge adapter -o both",
        "export sparse -o out --format sparse-bitmask",
    ):
        assert "a PEFT adapter (LORA) is in the model's folder" in must(*words.split()).err
    for out in ("new", "both", "out"):
        assert not {path.name for path in (world / out).iterdir()} & {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
    assert "make one with 'spp-fx inject sparse'" in one_line(command("merge", "sparse", "-o", "x").err)


def test_a_model_is_loaded_without_the_adapter_of_peft_beside_it(world, monkeypatch):
    """transformers would load it on top where PEFT is installed, and fail or answer as another model."""
    expected = loaded(world / "sparse")
    peft(world / "sparse", target_modules=["q_proj"])
    from transformers.integrations import peft as integration
    from transformers.models.auto import auto_factory

    for module in (ir_model, auto_factory, integration):
        monkeypatch.setattr(module, "is_peft_available", lambda: True)
    found = load_model(world / "sparse").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda c: c.pop("format_version"), "format_version: Field required"),
        (lambda c: c.pop("sites"), "sites: Field required"),
        (lambda c: c.update(peft_type=3), "peft_type"),
        (lambda c: c.update(format_version=2), "format_version"),
    ],
)
def test_a_damaged_adapter_of_our_own_is_not_taken_for_one_of_peft(world, change, fault):
    path = world / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(FormatError, match=fault):
        verify(world / "adapter")
