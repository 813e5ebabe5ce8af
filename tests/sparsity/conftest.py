"""A kernel is compiled by the first example that needs it; a deadline an example would count that in."""

from hypothesis import settings

settings.register_profile("compiled", deadline=None)
settings.load_profile("compiled")
