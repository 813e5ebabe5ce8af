"""How users name sites: by the last words of module names, or by globs over whole names."""

from fnmatch import fnmatchcase


def is_glob(text: str) -> bool:
    """Whether a name or path is a glob and not spelt out."""
    return any(character in text for character in "*?[")


def module_name(site: str) -> str:
    """The name of the module that holds a site's weight; stacks are named by their parameter."""
    return site.removesuffix(".weight")


def is_target(site: str, target: str) -> bool:
    """Whether a target names a site: by its last words, or as a glob over the whole name."""
    name = module_name(site)
    if is_glob(target):
        return fnmatchcase(name, target) or fnmatchcase(site, target)
    return name == target or site == target or name.endswith("." + target)
