"""Weight streams: safetensors files and model folders read and written tensor by tensor, all or nothing."""

from spp_fx.checkpoint.atomic import atomic_file, atomic_folder
from spp_fx.checkpoint.dtypes import dtype_name, torch_dtype
from spp_fx.checkpoint.folder import ModelFolder
from spp_fx.checkpoint.header import Header, TensorInfo, read_header
from spp_fx.checkpoint.layout import INDEX_NAME, OWN_FILES
from spp_fx.checkpoint.place import check_target
from spp_fx.checkpoint.shard import Shard
from spp_fx.checkpoint.stream import (
    Content,
    Rewritten,
    TensorSpec,
    copy_file,
    rewrite_shard,
    write_safetensors,
)
from spp_fx.checkpoint.workspace import Workspace, stamp, workspace

__all__ = [
    "INDEX_NAME",
    "OWN_FILES",
    "Content",
    "Header",
    "ModelFolder",
    "Rewritten",
    "Shard",
    "TensorInfo",
    "TensorSpec",
    "Workspace",
    "atomic_file",
    "atomic_folder",
    "check_target",
    "copy_file",
    "dtype_name",
    "read_header",
    "rewrite_shard",
    "stamp",
    "torch_dtype",
    "workspace",
    "write_safetensors",
]
