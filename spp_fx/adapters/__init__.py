"""Adapter methods: trainable factors of a site and the weight that they stand for."""

from spp_fx.adapters.method import (
    METHODS,
    Factors,
    FactorSpec,
    Method,
    MethodOps,
    initial_factor,
    make_method,
    register,
)
from spp_fx.adapters.spp import SPP

__all__ = [
    "METHODS",
    "SPP",
    "FactorSpec",
    "Factors",
    "Method",
    "MethodOps",
    "initial_factor",
    "make_method",
    "register",
]
