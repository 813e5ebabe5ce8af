"""Pruning: which entries of a weight are kept, and the walk over the layers that shows what they multiply."""

from spp_fx.pruning.criterion import CRITERIA, Criterion, make_criterion, register
from spp_fx.pruning.inputs import Inputs
from spp_fx.pruning.magnitude import Magnitude, magnitude_mask
from spp_fx.pruning.ria import Ria
from spp_fx.pruning.sparsegpt import SparseGpt
from spp_fx.pruning.wanda import Wanda

__all__ = [
    "CRITERIA",
    "Criterion",
    "Inputs",
    "Magnitude",
    "Ria",
    "SparseGpt",
    "Wanda",
    "magnitude_mask",
    "make_criterion",
    "register",
]
