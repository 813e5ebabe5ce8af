"""spp-fx: train pruned models without moving a zero, fold, prove and export them."""

__version__ = "0.1.0"
