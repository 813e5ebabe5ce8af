"""Pruning: which entries of a weight are kept, and the walk over the layers that shows what they multiply."""

from spp_fx.pruning.criteria.magnitude import Magnitude, magnitude_mask
from spp_fx.pruning.criteria.ria import Ria
from spp_fx.pruning.criteria.sparsegpt import SparseGpt
from spp_fx.pruning.criteria.wanda import Wanda
from spp_fx.pruning.criterion import CRITERIA, Criterion, make_criterion, register
from spp_fx.pruning.statistics import Inputs

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
