"""The formats that come with spp-fx; importing this module makes them known."""

from spp_fx.exporters import cusparselt, cutlass, onnx, plain, sparse_bitmask

__all__ = ["cusparselt", "cutlass", "onnx", "plain", "sparse_bitmask"]
