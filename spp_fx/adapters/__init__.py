"""Adapter methods: trainable factors of a site and the weight that they stand for."""
