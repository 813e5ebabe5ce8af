"""recipes: the papers' settings by name, for prune, inject and train."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from spp_fx.adapters.adapter_folder import AdapterFolder
from spp_fx.adapters.method import METHODS
from spp_fx.console import Table
from spp_fx.errors import FormatError, UsageError
from spp_fx.registry import did_you_mean
from spp_fx.storage.folder import is_adapter
from spp_fx.verbs.settings import InjectSettings, PruneSettings, TrainSettings

VERBS = ("prune", "inject", "train")

Options = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """What a paper trained one model with.

    Attributes:
        model: the one it was published for.
        rows: of one optimizer step, over all devices.
        sections: options of each verb, by the names of the dataclasses' fields. `accumulate` is not among them: it
            depends on the number of devices.
    """

    name: str
    paper: str
    model: str
    rows: int
    sections: Mapping[str, Options]

    def options(self, verb: str, devices: int = 1) -> Options:
        """The options of a verb; of train, with as many forwards to a step as give the paper's rows.

        Raises:
            UsageError: the rows of a step cannot be spread evenly over so many devices.
        """
        own = dict(self.sections.get(verb, {}))
        if verb != "train":
            return own
        each, left = divmod(self.rows, devices)
        if left:
            raise UsageError(
                f"recipe {self.name}: its steps have {self.rows} rows, which {devices} devices cannot share evenly; "
                "start as many as divide them"
            )
        # The paper's rows of a forward, or the most that fit into a device's share.
        batch = next(size for size in range(min(own["batch_size"], each), 0, -1) if each % size == 0)
        return own | {"batch_size": batch, "accumulate": each // batch}

    def doubt(self, adapter: Path) -> str | None:
        """A warning where an adapter is of another method than the one whose settings these are."""
        own = self.sections["inject"]["method"]
        method = AdapterFolder.open(adapter).method.name if is_adapter(adapter) else own
        if method == own:
            return None
        return f"{adapter}: warning: its method is {method}, and the settings of recipe {self.name} are for {own}"


@dataclass(frozen=True)
class Listed:
    """All recipes, or one as a file for --config."""

    recipes: tuple[Recipe, ...]
    one: bool
    devices: int

    def to_json(self) -> Any:
        found = [
            {"name": each.name, "paper": each.paper, "model": each.model, "rows": each.rows}
            | {verb: _spelled(each.options(verb, self.devices)) for verb in VERBS}
            for each in self.recipes
        ]
        return found[0] if self.one else {"recipes": found}

    def lines(self) -> Iterator[str | Table]:
        if self.one:
            yield to_yaml(self.recipes[0], self.devices).rstrip("\n")
            return
        headings = ("recipe", "model", "method", "rank", "scale", "lr", "rows", "tokens", "epochs", "paper")
        rows: list[tuple[str, ...]] = []
        for each in self.recipes:
            inject, train = each.sections["inject"], each.sections["train"]
            numbers = (inject["rank"], f"{inject['scale']:g}", f"{train['lr']:g}", each.rows)
            shown = (*numbers, train["seq_len"], f"{train['epochs']:g}", each.paper)
            rows.append((each.name, each.model, inject["method"], *map(str, shown)))
        yield Table(headings, rows, left=3)
        yield "spp-fx recipes NAME prints one as a file for --config"


def to_yaml(recipe: Recipe, devices: int = 1) -> str:
    """A recipe as a file that `--config` takes: a section for each verb, options as the command line spells them."""
    train = recipe.options("train", devices)
    split = (
        f"{train['batch_size']} rows x {train['accumulate']} forwards x {devices} device{'s' * (devices > 1)}"
    )
    sections = {verb: _spelled(recipe.options(verb, devices)) for verb in VERBS}
    return (
        f"# {recipe.name}: {recipe.model}, {recipe.paper}\n# A step: {recipe.rows} rows = {split}.\n"
        + yaml.safe_dump(sections, sort_keys=False)
    )


def _spelled(options: Options) -> Options:
    return {name.replace("_", "-"): value for name, value in options.items()}


def list_recipes(name: str | None = None, devices: int | None = None) -> Listed:
    """All recipes, or the one of a name.

    Args:
        devices: among which the rows of a step are divided; by default as many as torchrun has started, or 1.

    Raises:
        UsageError: no recipe has that name, or devices are given without one.
    """
    if name is None and devices is not None:
        raise UsageError("--devices divides the rows of one recipe; give its NAME, or leave --devices out")
    chosen = tuple(all_recipes().values()) if name is None else (find_recipe(name),)
    return Listed(chosen, name is not None, processes() if devices is None else devices)


def processes() -> int:
    """How many processes torchrun has started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def find_recipe(name: str) -> Recipe:
    """The recipe of a name; UsageError lists what there is."""
    found = all_recipes()
    if name not in found:
        raise UsageError(
            f"there is no recipe '{name}'; there are: {', '.join(found)}{did_you_mean(name, found)}"
        )
    return found[name]


@cache
def all_recipes() -> dict[str, Recipe]:
    """Every recipe of the package, by name.

    Raises:
        FormatError: a recipe sets an option that its verb or method does not have.
    """
    found: dict[str, Recipe] = {}
    for file in sorted(files("spp_fx").joinpath("recipes").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yaml"):
            found |= parse_recipes(file.read_text(encoding="utf-8"), file.name)
    return found


def parse_recipes(text: str, where: str) -> dict[str, Recipe]:
    """The recipes of a file: `paper`, options shared by all under each verb's name, and `recipes` with their own."""
    content: dict[str, Any] = yaml.safe_load(text)
    shared = {verb: content.get(verb, {}) for verb in VERBS}
    found: dict[str, Recipe] = {}
    for name, own in content["recipes"].items():
        sections = {
            verb: {key.replace("-", "_"): value for key, value in (shared[verb] | own.get(verb, {})).items()}
            for verb in VERBS
        }
        _check_options(f"{where}: {name}", sections)
        found[name] = Recipe(name, content["paper"], own["model"], own["rows"], sections)
    return found


def _check_options(where: str, sections: Mapping[str, Options]) -> None:
    method = METHODS.find(sections["inject"]["method"])
    known = {
        "prune": {each.name for each in fields(PruneSettings)},
        "inject": {each.name for cls in (InjectSettings, method) for each in fields(cls)},
        "train": {each.name for each in fields(TrainSettings)},
    }
    for verb, options in sections.items():
        if unknown := sorted(options.keys() - known[verb]):
            raise FormatError(f"{where}: {verb} has no option {unknown[0]}")
