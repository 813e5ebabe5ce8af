"""Passes: named, typed rewrites and checks of programs, and pipelines of them."""
