"""Runs that are killed again and again: they leave nothing or all of it, and the next ends as if undisturbed."""
