"""Patterns, masks, the lock, and the fast look at zeros."""

from spp_fx.sparsity.comparison import Comparison, MaskDifference, Position, compare, compare_masks
from spp_fx.sparsity.detect import detect_pattern
from spp_fx.sparsity.digests import digest_masks
from spp_fx.sparsity.dtypes import ElementType, element_type
from spp_fx.sparsity.locate import locator
from spp_fx.sparsity.lock import LOCK_NAME, Lock, LockEntry, load_lock, lock_beside, make_entry
from spp_fx.sparsity.mask import PackedMask
from spp_fx.sparsity.pattern import NM, Pattern, Unstructured, implies, parse_pattern
from spp_fx.sparsity.scan import (
    Scan,
    count_non_finite,
    first_non_finite,
    load_scanner,
    pack_mask,
    scan_file,
    scan_tensor,
)
from spp_fx.sparsity.violations import Group, Violations, scan_bits
from spp_fx.sparsity.weights import Weights, is_matrix

__all__ = [
    "LOCK_NAME",
    "NM",
    "Comparison",
    "ElementType",
    "Group",
    "Lock",
    "LockEntry",
    "MaskDifference",
    "PackedMask",
    "Pattern",
    "Position",
    "Scan",
    "Unstructured",
    "Violations",
    "Weights",
    "compare",
    "compare_masks",
    "count_non_finite",
    "detect_pattern",
    "digest_masks",
    "element_type",
    "first_non_finite",
    "implies",
    "is_matrix",
    "load_lock",
    "load_scanner",
    "locator",
    "lock_beside",
    "make_entry",
    "pack_mask",
    "parse_pattern",
    "scan_bits",
    "scan_file",
    "scan_tensor",
]
