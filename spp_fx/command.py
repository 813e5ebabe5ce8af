"""Commands of click whose options are the fields of dataclasses."""

import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import click
from click.core import ParameterSource

from spp_fx.console import Output
from spp_fx.errors import SppFxError, UsageError, unreadable
from spp_fx.options import check_options, default_of, value_type
from spp_fx.registry import Registry, did_you_mean

HELP: dict[str, Any] = {"context_settings": {"help_option_names": ["-h", "--help"]}}
COMMON = (
    click.Option(["as_json", "--json"], is_flag=True, help="Print the result as JSON."),
    click.Option(["quiet", "-q", "--quiet"], is_flag=True, help="No progress and no log on stderr."),
    click.Option(["--debug"], is_flag=True, help="Show the trace of an error."),
    click.Option(
        ["--allow-links"], is_flag=True, help="Follow symbolic links that leave a folder. Off: refused."
    ),
)

FRESH = click.Option(["--fresh"], is_flag=True, help="Start over, ignoring what an interrupted run left.")
REMOTE_CODE = click.Option(
    ["--trust-remote-code"],
    is_flag=True,
    help="Run code that comes with the model folder. Off: such models are refused.",
)


def out_option(text: str) -> click.Option:
    return click.Option(["out", "-o", "--out"], type=click.Path(path_type=Path), help=text)


def force_option(text: str = "Replace the output if it exists.") -> click.Option:
    return click.Option(["--force"], is_flag=True, help=text)


class Command(click.Command):
    """A command that may have the options of the class that one of them, such as `--method`, chooses."""

    fixed: Sequence[click.Parameter] = ()
    registry: Callable[[], Registry[Any]] | None = None
    choice = "method"
    per_site = False

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if self.registry is not None:
            at = next(i for i, each in enumerate(self.fixed) if each.name == self.choice)
            default, given = self.fixed[at].default, None
            for word, following in zip(args, [*args[1:], ""], strict=True):
                given = following if word == f"--{self.choice}" else given
                given = word.partition("=")[2] if word.startswith(f"--{self.choice}=") else given
            own = {name for each in self.fixed for name in (*each.opts, each.name)}
            usual = default if isinstance(default, str) else None
            with _naming_option(self.choice):
                added = _choice_options(self.registry(), given or None, usual, self.per_site)
            if taken := [each.opts[0] for each in added if own.intersection([*each.opts, each.name])]:
                raise UsageError(
                    f"{taken[0]}: an option for one --{self.choice} has the name of an option of '{self.name}'"
                )
            ctx.meta["chosen options"] = [each.name for each in added]
            self.params = [*self.fixed[: at + 1], *added, *self.fixed[at + 1 :]]
        with _naming_origins(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with _naming_origins(ctx):
            return super().invoke(ctx)


@contextmanager
def _naming_origins(context: click.Context) -> Generator[None, None, None]:
    """Add to an error where the options that it names were set, if not on the command line."""
    try:
        yield
    except SppFxError as error:
        error.args = (f"{error}{_origins(context, str(error))}",)
        raise
    except click.UsageError as error:
        said = error.format_message()
        if note := _origins(context, said):
            raise click.UsageError(said.rstrip(".") + note, error.ctx) from error
        raise


@contextmanager
def _naming_option(name: str) -> Generator[None, None, None]:
    """Begin an error about a value with its option, so that `_origins` finds where it was set."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"--{name}: {error}") from error


def _origins(context: click.Context, message: str) -> str:
    """` (--init is from run.yaml)` for each option that a message names and a file or recipe set."""
    origins: dict[str, str] = context.meta.get("origins", {})
    flags = {f"--{name}" for name in re.findall(r"(?:--|option )([a-z][a-z-]*)", message)}
    found: dict[str, list[str]] = {}
    for each in context.command.params:
        name = str(each.name)
        set_there = context.get_parameter_source(name) in (ParameterSource.DEFAULT_MAP, None)
        if name in origins and set_there and each.opts[0] in flags:
            found.setdefault(origins[name], []).append(each.opts[0])
    notes = [
        f"{' and '.join(own)} {'is' if len(own) == 1 else 'are'} from {where}" for where, own in found.items()
    ]
    return f" ({'; '.join(notes)})" if notes else ""


def command(
    group: click.Group,
    name: str,
    *params: click.Parameter,
    registry: Callable[[], Registry[Any]] | None = None,
    choice: str = "method",
    per_site: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A command of a group with the options that every one has; its function gets an `Output` first.

    A parameter of the function that is annotated with a dataclass gets an instance, made of options that are its
    fields; with `X | None` it gets None where the first field, which must have no default, is not given.
    Dataclasses that have a field of the same name share that option, as the first of them declares it.

    Args:
        params: of all other parameters.
        registry: what the option `choice` chooses from; the function's `{choice}_options` gets those options that
            are given and belong to what was chosen.
        per_site: let numbers among these options differ between sites: `--rank 16 --rank down_proj@32`. The values
            with a name are given as `overrides`, `rank:down_proj@32`.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        settings: dict[str, tuple[type[Any], bool]] = {}
        for key, hint in get_type_hints(function).items():
            for each in (hint, *get_args(hint)):
                if is_dataclass(each):
                    settings[key] = cast("type[Any]", each), each is hint

        def callback(as_json: bool, quiet: bool, debug: bool, allow_links: bool, **values: Any) -> Any:
            from spp_fx.storage.links import links_allowed

            context, output = click.get_current_context(), Output(as_json=as_json, quiet=quiet)
            _drop_replaced(context, values)
            if line := _keep_rows(context, values):
                output.say(line)
            if registry is not None:
                options = {key: values.pop(key) for key in context.meta["chosen options"]}
                source = context.get_parameter_source
                given = {
                    key: options[key]
                    for key in options
                    if source(key) is not ParameterSource.DEFAULT and key not in context.meta["replaced"]
                }
                with _naming_option(choice):
                    registry().find(values[choice])
                check_options(registry(), values[choice], given)
                values[f"{choice}_options"] = _overrides_apart(given) if per_site else given
            made: dict[str, Any] = {}
            for key, (cls, required) in settings.items():
                own = {each.name: values[each.name] for each in fields(cls)}
                made[key] = _instance(cls, own) if required or next(iter(own.values())) else None
                if made[key] is None:
                    others = (
                        each.name
                        for other, _ in settings.values()
                        if other is not cls
                        for each in fields(other)
                    )
                    _refuse_unread(context, list(own), set(others))
            for name in {each.name for cls, _ in settings.values() for each in fields(cls)}:
                del values[name]
            values |= made
            _silence_libraries(debug)
            with links_allowed(allow_links):
                return function(output, **values)

        arguments = [each for each in params if isinstance(each, click.Argument)]
        options = [each for each in params if isinstance(each, click.Option)]
        derived: dict[str | None, click.Option] = {}
        for cls, required in settings.values():
            for each in _click_options(cls, required=required):
                derived.setdefault(each.name, each)
        help_text = inspect.cleandoc(function.__doc__ or "")
        made = Command(
            name,
            callback=callback,
            params=[*arguments, *COMMON, *options, *derived.values()],
            help=help_text,
            short_help=help_text.splitlines()[0],
            **HELP,
        )
        made.fixed, made.registry, made.choice, made.per_site = made.params, registry, choice, per_site
        group.add_command(made)
        return function

    return decorate


def _drop_replaced(context: click.Context, values: dict[str, Any]) -> None:
    """Take back defaults of a file or recipe where the command line gives the alternative, as --steps for epochs."""
    source = context.get_parameter_source
    typed = [name for name in values if source(name) is ParameterSource.COMMANDLINE]
    replaced = [
        name for name in values if source(name) is ParameterSource.DEFAULT_MAP and _replaced(name, typed)
    ]
    for name in replaced:
        values[name] = next(each.default for each in context.command.params if each.name == name)
    context.meta["replaced"] = replaced


def _keep_rows(context: click.Context, values: dict[str, Any]) -> str | None:
    """Let --accumulate follow another --batch-size, so that an optimizer step keeps the rows of a file or recipe.

    Returns:
        What to say about it; None where nothing is changed.

    Raises:
        UsageError: the batch size does not divide the rows.
    """
    where, batch, forwards = context.meta.get(STEP, (None, 0, 0))
    if where is None or (values["batch_size"], values["accumulate"]) == (batch, forwards):
        return None
    rows, own = batch * forwards, values["batch_size"]
    typed = context.get_parameter_source("accumulate") is ParameterSource.COMMANDLINE
    if typed or context.meta["origins"]["accumulate"] != where:
        now = own * values["accumulate"]
        return f"a step has {now} rows on each device, that of {where} {rows}" if now != rows else None
    if own < 1:
        return None  # refused with the other settings
    values["accumulate"], left = divmod(rows, own)
    if left:
        raise UsageError(
            f"--batch-size {own} does not divide the {rows} rows that a step of {where} has on each device; "
            "give --accumulate, too"
        )
    return f"--accumulate {values['accumulate']}: with --batch-size {own} a step keeps the {rows} rows of {where}"


def _refuse_unread(context: click.Context, own: Sequence[str], others: Collection[str]) -> None:
    """UsageError for an option of a dataclass whose first field is not given, unless another one has it, too."""
    flags = {each.name: each.opts[0] for each in context.command.params}
    source = context.get_parameter_source
    for name in own[1:]:
        if name not in others and source(name) is not ParameterSource.DEFAULT:
            raise UsageError(f"{flags[name]} belongs to {flags[own[0]]}; give that, too, or leave it out")


def _silence_libraries(debug: bool) -> None:
    """Keep other libraries' warnings and progress bars out of the output."""
    if debug:
        return
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    # The libraries read these when they are imported, which many commands never do.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules:  # called from a program that has it
        from transformers import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


def _click_options(cls: type[Any], *, required: bool = True) -> list[click.Option]:
    """The options of a dataclass; with `required` false, fields without a default need not be given either."""
    hints = get_type_hints(cls)
    return [_click_option(each, hints[each.name], each.metadata["help"], required) for each in fields(cls)]


class PerSite(click.Option):
    """A number that may be given again for some sites: 16 as a number, `down_proj@32` as text.

    Args:
        check: what is wrong with a number, as in `option`.
    """

    def __init__(self, *names: Any, check: Callable[[Any], str | None] | None, **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.check = check

    def consume_value(self, ctx: click.Context, opts: Any) -> tuple[Any, ParameterSource]:
        value, source = super().consume_value(ctx, opts)
        if source is ParameterSource.COMMANDLINE and all("@" in str(each) for each in value):
            # The value for all sites is still that of a file or recipe.
            before = (ctx.default_map or {}).get(str(self.name), ())
            value = (*(before if isinstance(before, list | tuple) else (before,)), *value)
        return value, source

    def type_cast_value(self, ctx: click.Context, value: Any) -> tuple[Any, ...]:
        values = value if isinstance(value, tuple | list) else () if value is None else (value,)
        found: list[Any] = []
        for each in values:
            sites, at, number = str(each).rpartition("@")
            if at and not sites:
                fault = f"'{each}' names no site before the @; write NAME@VALUE, or VALUE alone for all sites"
                raise click.BadParameter(fault, ctx, self)
            converted = self.type.convert(number if at else each, self, ctx)
            if self.check is not None and (fault := self.check(converted)):
                where = f" in '{each}'" if at else ""
                raise click.BadParameter(f"{self.name} {fault}, got {converted}{where}", ctx, self)
            found.append(each if at else converted)
        return tuple(found)


def _overrides_apart(given: dict[str, Any]) -> dict[str, Any]:
    """The options that are given, with the values for some sites as `overrides`."""
    plain = {key: value for key, value in given.items() if not isinstance(value, tuple)}
    overrides: list[str] = []
    for key, values in given.items():
        for value in values if isinstance(values, tuple) else ():
            if isinstance(value, str):
                overrides.append(f"{key}:{value}")
            else:
                plain[key] = value
    return plain | ({"overrides": tuple(overrides)} if overrides else {})


def _choice_options(
    registry: Registry[Any], given: str | None, usual: str | None, per_site: bool
) -> list[click.Option]:
    """The options of all classes of a registry; those of one name are as the chosen class has it.

    Args:
        given: the class that the command line chooses: help shows its options alone.
        usual: the one that is chosen otherwise: help shows all options, with who has them.
    """
    chosen = given or usual
    if chosen is not None:
        registry.find(chosen)
    owners: dict[str, dict[str, Field[Any]]] = {}
    for name in sorted(registry, key=lambda name: (name != chosen, name)):
        for each in fields(registry[name]):
            owners.setdefault(each.name, {})[name] = each
    found: list[click.Option] = []
    for key, own in owners.items():
        name, each = next(iter(own.items()))
        kind, text = value_type(get_type_hints(registry[name])[key]), each.metadata.get("help", "")
        differing = ""
        if given is None:
            differing = _differing_defaults(own)
            if differing:
                text = f"{text}  [default: {differing}]"
            elif len(own) < len(registry):
                text = f"{', '.join(sorted(own))}: {text}"
        if per_site and kind in (int, float):
            default = default_of(each)
            flag = each.metadata.get("flag") or key.replace("_", "-")
            shown: dict[str, Any] = (
                {} if default is MISSING else {"default": (default,), "show_default": True}
            )
            metavar = f"[NAME@]{'INTEGER' if kind is int else 'FLOAT'}"
            made: click.Option = PerSite(
                [key, f"--{flag}"], type=kind, multiple=True, help=text, metavar=metavar,
                check=each.metadata.get("check"), **shown,
            )  # fmt: skip
        else:
            made = _click_option(each, kind, text)
        made.hidden = given is not None and given not in own
        made.show_default = made.show_default and not differing
        found.append(made)
    return found


def _differing_defaults(own: Mapping[str, Field[Any]]) -> str:
    """`16 (spp), 32 (hira, sqft)`: the defaults of one option, and who has each; empty where all agree."""
    names: dict[Any, list[str]] = {}
    for name, each in own.items():
        names.setdefault(default_of(each), []).append(name)
    shown = [f"{value} ({', '.join(group)})" for value, group in names.items()]
    return ", ".join(shown) if len(shown) > 1 else ""


def _instance(cls: type[Any], values: dict[str, Any]) -> Any:
    """An instance of a dataclass from its options' values, with those split at commas that ask for it."""
    split = [each.name for each in fields(cls) if each.metadata["split"]]
    words = {name: tuple(word for text in values[name] for word in text.split(",") if word) for name in split}
    return cls(**values | words)


def _click_option(each: Field[Any], hint: Any, text: str, required: bool = True) -> click.Option:
    metadata, kind, default = each.metadata, value_type(hint), default_of(each)
    flag = metadata.get("flag") or each.name.replace("_", "-")
    names = [each.name, f"--{flag}", *filter(None, [metadata.get("short")])]
    if kind is bool:
        if default is False:
            return click.Option(names, is_flag=True, help=text)
        names = [each.name, f"--{flag}/--no-{flag}"]
        return click.Option(names, default=default, show_default=default is not None, help=text)
    settings: dict[str, Any] = {"help": text, "metavar": metadata.get("metavar")}
    if get_origin(kind) is tuple:
        return click.Option(names, multiple=True, **settings)
    if get_origin(kind) is Literal:
        kind = click.Choice(get_args(kind))
    elif kind is Path:
        kind = click.Path(path_type=Path)
    if default is MISSING:
        return click.Option(names, type=kind, required=required, **settings)
    return click.Option(names, type=kind, default=default, show_default=True, **settings)


def model_folder(name: str) -> Path:
    from spp_fx.storage.folder import resolve_model

    return resolve_model(name)


def criteria() -> Registry[Any]:
    from spp_fx.pruning.criterion import CRITERIA

    return CRITERIA


def formats() -> Registry[Any]:
    from spp_fx.exporters.format import FORMATS

    return FORMATS


def methods() -> Registry[Any]:
    from spp_fx.adapters.method import METHODS

    return METHODS


def reconstructions() -> Registry[Any]:
    """Adapter methods, and the updates of single matrices, which have no options."""
    return methods().extended("reconstruction method", admm=NoOptions)


@dataclass(frozen=True)
class NoOptions:
    """The options of a choice that has none."""


def default_out(model: str, suffix: str) -> Path:
    """MODEL-suffix beside a model folder; in the current folder where MODEL is a hub id."""
    path = Path(model)
    return beside(path, suffix) if path.exists() else Path(f"{path.name}-{suffix}")


def beside(folder: Path, suffix: str) -> Path:
    """FOLDER-suffix beside a folder, absolute only where the folder is."""
    if folder.name in ("", ".."):  # such as the current folder: its name is not in the path
        folder = folder.resolve()
        return Path(os.path.relpath(folder.parent)) / f"{folder.name}-{suffix}"
    return folder.parent / f"{folder.name}-{suffix}"


def read_config(context: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    """Options from a YAML file as defaults, which the command line overrides.

    The file is a mapping of options, or has a section for each of several commands, as `spp-fx recipes NAME` writes it.
    """
    if path is None:
        return
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {unreadable(error)}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: cannot be read as YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: must be a mapping of options, one 'name: value' per line")
    verbs = cast(click.Group, context.find_root().command).commands
    sections = {name: value for name, value in content.items() if name in verbs and isinstance(value, dict)}
    if sections:
        if outside := [str(name) for name in content if name not in sections]:
            raise UsageError(
                f"{path}: '{outside[0]}' stands outside the sections of commands ({', '.join(sections)})"
            )
        content = sections.get(str(context.command.name), {})
    _set_defaults(context, content, str(path), first=True)


def read_recipe(context: click.Context, parameter: click.Parameter, name: str | None) -> None:
    """A paper's options as defaults, which --config and the command line override."""
    if name is None:
        return
    from spp_fx.verbs.recipes import find_recipe, processes

    context.meta["recipe"] = recipe = find_recipe(name)
    options = recipe.options(str(context.command.name), processes())
    _set_defaults(context, options, f"--recipe {name}", first=False)


def _wrong_types(parameter: click.Parameter) -> tuple[type, ...]:
    """What YAML may hold and a parameter cannot: click would fail, or take true as the number 1."""
    return (
        (list, tuple, dict)
        if isinstance(parameter.type, click.types.BoolParamType)
        else (list, tuple, dict, bool)
    )


def _set_defaults(context: click.Context, content: dict[Any, Any], where: str, *, first: bool) -> None:
    """Make options defaults of a command.

    Args:
        where: what an error message begins with.
        first: whether they come before defaults that are set already.
    """
    params = [each for each in context.command.params if each.expose_value]
    known = {
        name.lstrip("-").replace("-", "_"): each
        for each in params
        for name in (str(each.name), *each.opts)
        if len(name.lstrip("-")) > 1
    }
    options: dict[str, Any] = {str(name).replace("-", "_"): value for name, value in content.items()}
    if unknown := sorted(options.keys() - known.keys()):
        wrong = unknown[0].replace("_", "-")
        shown = [each for each in params if isinstance(each, click.Option) and not each.hidden]
        flags = sorted(max(each.opts, key=len).lstrip("-") for each in shown)
        raise UsageError(
            f"{where}: unknown option '{wrong}'; known: {', '.join(flags)}{did_you_mean(wrong, flags)}"
        )
    given: dict[str, Any] = {}
    for name, value in options.items():
        each = known[name]
        # One value of an option that may be repeated: click would take a text letter by letter.
        several = each.nargs != 1 or (isinstance(each, click.Option) and each.multiple)
        values = value if several and isinstance(value, list | tuple) else [value]
        if wrong := [one for one in values if isinstance(one, _wrong_types(each))]:
            raise UsageError(f"{where}: {name.replace('_', '-')} does not take {wrong[0]!r}")
        given[str(each.name)] = values if several else value
    step = [given.get(name) for name in ("batch_size", "accumulate")]
    if all(isinstance(value, int) for value in step) and (not first or STEP not in context.meta):
        context.meta[STEP] = (where, *step)
    set_before: dict[str, Any] = dict(context.default_map or {})
    over, under = (given, set_before) if first else (set_before, given)
    context.default_map = {name: value for name, value in under.items() if not _replaced(name, over)} | over
    origins: dict[str, str] = context.meta.setdefault("origins", {})
    for name in given:
        if first or name not in set_before:
            origins[name] = where


STEP = "step"
"""What the context remembers of a file or recipe with the rows of an optimizer step: its name, rows of a forward,
forwards."""
ALTERNATIVES = (("steps", "epochs"), ("rank", "budget"))
"""Options of which one is given instead of the other."""


def _replaced(name: str, by: Collection[str]) -> bool:
    """Whether options that count more hold an alternative to one."""
    return any(name in pair and any(other in by for other in pair if other != name) for pair in ALTERNATIVES)


CONFIG = click.Option(
    ["--config"],
    type=click.Path(path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=read_config,
    help="YAML file with any of these options, 'seq-len: 512'; the command line overrides it.",
)
RECIPE = click.Option(
    ["--recipe"],
    metavar="NAME",
    is_eager=True,
    expose_value=False,
    callback=read_recipe,
    help="A paper's settings, 'spp-fx recipes' lists them; --config and the command line override it.",
)
