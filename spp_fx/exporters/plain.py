"""safetensors: the plain dense folder that servers load, with lock and manifest beside it."""

import json
from pathlib import Path
from typing import Any

from spp_fx.exporters.format import (
    Decoded,
    ExportSettings,
    Format,
    Say,
    Source,
    Tick,
    register,
)
from spp_fx.exporters.legacy import without_sparsity
from spp_fx.exporters.manifest import MANIFEST, Manifest, site_sizes
from spp_fx.exporters.read_back import check_copied
from spp_fx.sparsity.lock import LOCK_NAME
from spp_fx.sparsity.scan import Scan, scan_stored
from spp_fx.sparsity.weights import Sites, Weights
from spp_fx.storage.folder import ModelFolder, within
from spp_fx.storage.safetensors import Shard
from spp_fx.storage.writer import copy_file, copy_others, rewrite_shard, write_shards


def write(source: Source, target: Path, settings: ExportSettings, tick: Tick, say: Say) -> dict[str, Any]:
    del settings

    def copy(shard: Shard, file: Path) -> dict[str, Any]:
        rewrite_shard(shard, file, lambda info: tick(info.name, info.nbytes))
        return {}

    write_shards(source.folder, target, copy, source.work)
    copy_others(source.folder, target, skip=[LOCK_NAME, MANIFEST])
    write_plain_config(source.folder, target, say)
    compared = sum(
        check_copied(source.folder, shard.header.tensors, target / shard.name)
        for shard in source.folder.shards
    )
    records = [source.record(entry, "dense") for entry in source.lock.sites]
    dense, files = sum(record.dense_bytes for record in records), target.rglob("*.safetensors")
    source.finish(target, "safetensors", source.lock, records, sizes=site_sizes(dense, dense, files))
    return {"tensors_equal": compared}


def write_plain_config(folder: ModelFolder, target: Path, say: Say) -> None:
    """Take a sparsity_config out of the copied config.json: servers refuse it, or load the wrong weights."""
    config, removed = without_sparsity(folder.config)
    if removed:
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (target / "config.json").write_text(text + "\n", encoding="utf-8")
        say(f"config.json: left out, for the weights are plain: {', '.join(removed)}")


def read(folder: Path, manifest: Manifest) -> Weights:
    """The weights of an exported folder."""
    model = ModelFolder.open(folder)

    def scan(name: str, transposed: bool) -> Scan:
        return scan_stored(model.info(name)[0], name, transposed=transposed)

    sites = Sites({record.name: record.transposed for record in manifest.tensors})
    return Weights(frozenset(model.names), scan, lambda name: model.info(name)[0].name, lambda: sites)


def decode(folder: Path, manifest: Manifest) -> Decoded:
    """The tensors of an exported folder, which are the model's."""
    del manifest
    model = ModelFolder.open(folder)
    return Decoded({name: model.info(name)[1].shape for name in model.names}, model.read)


def restore(folder: Path, manifest: Manifest, target: Path, tick: Tick) -> None:
    """Copy the weight files and their index."""
    del manifest
    model = ModelFolder.open(folder)
    for name in [shard.name for shard in model.shards] + ([model.index] if model.index else []):
        copy = within(target, name)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy_file(within(folder, name), copy)
        tick(name, copy.stat().st_size)


FORMAT = register(Format("safetensors", write, read, decode=decode, restore=restore, mends_config=True))
