"""safetensors: the plain dense folder that servers load, with lock and manifest beside it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spp_fx.exporters.format import Decoded, Format, Say, Source, Tick, register
from spp_fx.exporters.legacy import without_sparsity
from spp_fx.exporters.manifest import MANIFEST, Manifest, site_sizes
from spp_fx.exporters.read_back import check_copied
from spp_fx.sparsity.lock import LOCK_NAME
from spp_fx.storage.folder import ModelFolder, within
from spp_fx.storage.safetensors import Shard
from spp_fx.storage.writer import copy_file, copy_others, rewrite_shard, write_shards


@register("safetensors")
@dataclass(frozen=True)
class Plain(Format):
    """The plain folder that servers load."""

    plain = True

    def write(self, source: Source, folder: Path, tick: Tick, say: Say) -> dict[str, Any]:
        def copy(shard: Shard, file: Path) -> dict[str, Any]:
            rewrite_shard(shard, file, lambda info: tick(info.name, info.nbytes))
            return {}

        write_shards(source.folder, folder, copy, source.work)
        copy_others(source.folder, folder, skip=[LOCK_NAME, MANIFEST])
        write_plain_config(source.folder, folder, say)
        compared = sum(
            check_copied(source.folder, shard.header.tensors, folder / shard.name)
            for shard in source.folder.shards
        )
        records = [source.record(entry, "dense") for entry in source.lock.sites]
        dense = sum(record.dense_bytes for record in records)
        sizes = site_sizes(dense, dense, folder.rglob("*.safetensors"))
        source.finish(folder, self.name, records, sizes=sizes)
        return {"tensors_equal": compared}

    @classmethod
    def decode(cls, folder: Path, manifest: Manifest) -> Decoded:
        model = ModelFolder.open(folder)
        shapes = {name: model.info(name)[1].shape for name in model.names}

        def shard(name: str) -> Shard:
            return model.info(name)[0]

        return Decoded(shapes, model.read, lambda name: shard(name).name, shard)

    @classmethod
    def restore(cls, folder: Path, manifest: Manifest, target: Path, tick: Tick) -> bool:
        model = ModelFolder.open(folder)
        for name in [shard.name for shard in model.shards] + ([model.index] if model.index else []):
            copy = within(target, name)
            copy_file(within(folder, name), copy)
            tick(name, copy.stat().st_size)
        return True


def write_plain_config(folder: ModelFolder, target: Path, say: Say) -> None:
    """Take a sparsity_config out of the copied config.json: servers refuse it, or load the wrong weights."""
    config, removed = without_sparsity(folder.config)
    if removed:
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (target / "config.json").write_text(text + "\n", encoding="utf-8")
        say(f"config.json: left out, since the weights are plain: {', '.join(removed)}")
