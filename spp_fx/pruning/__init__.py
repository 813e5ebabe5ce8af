"""Pruning: criteria that choose which entries of a weight are kept, and the walk over the layers."""
