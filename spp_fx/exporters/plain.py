"""safetensors: the plain dense folder that servers load, with lock and manifest beside it."""

from pathlib import Path
from typing import Any

from spp_fx.checkpoint import ModelFolder, Shard, TensorInfo, rewrite_model
from spp_fx.exporters.manifest import MANIFEST, Manifest
from spp_fx.exporters.read_back import check_copied
from spp_fx.exporters.registry import ExportSettings, Format, Say, Tick, Weights, register
from spp_fx.exporters.source import Source, scan_stored
from spp_fx.sparsity import LOCK_NAME, Scan


def write(source: Source, target: Path, settings: ExportSettings, tick: Tick, say: Say) -> dict[str, Any]:
    """Plain dense safetensors for servers: the folder as it is, with lock and manifest."""
    del settings, say

    def keep(shard: Shard, info: TensorInfo) -> None:
        tick(info.name, info.nbytes)

    rewrite_model(source.folder, target, keep, skip=[LOCK_NAME, MANIFEST])
    compared = sum(
        check_copied(source.folder, shard.header.tensors, target / shard.name)
        for shard in source.folder.shards
    )
    records = [source.record(entry, "dense") for entry in source.lock.sites]
    size = source.folder.stored_bytes
    source.finish(target, "safetensors", source.lock, records, sizes={"dense_bytes": size, "bytes": size})
    return {"tensors_equal": compared}


def read(folder: Path, manifest: Manifest) -> Weights:
    """The weights of an exported folder."""
    model = ModelFolder.open(folder)

    def scan(name: str, transposed: bool) -> Scan:
        return scan_stored(model.info(name)[0], name, transposed=transposed)

    sites = {record.name: record.transposed for record in manifest.tensors}
    return Weights(frozenset(model.names), scan, lambda name: model.info(name)[0].name, lambda: sites)


FORMAT = register(Format("safetensors", write, read))
