"""The command line: parse, call a workflow, show the result."""

import gc
import signal
import sys
import traceback

import click

from spp_fx.cli.base import cli
from spp_fx.errors import SppFxError


def main() -> None:
    """Entry point: runs the command and turns errors into one clear line and an exit code."""
    code = run(sys.argv[1:])
    # The interpreter would look for garbage among all that is still alive. What must be finished is by now: no
    # file, process or folder is left to a finaliser.
    gc.freeze()
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run a command line; returns 0 if it holds, 1 if it does not or failed, 2 for wrong usage."""
    # A terminated run cleans its temporary folder up like an interrupted one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    debug = "--debug" in arguments
    try:
        code = cli.main(args=arguments, prog_name="spp-fx", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        click.echo("spp-fx: interrupted; nothing is left half written", err=True)
        _tell(error)
        return 130
    except SystemExit as error:
        _tell(error)
        raise
    except SppFxError as error:
        return _failed(str(error), error.exit_code, debug)
    except OSError as error:
        return _failed(str(error), 1, debug)
    except Exception as error:  # noqa: BLE001 - the last net: a bug is reported in one line, its trace with --debug
        _tell(error)
        return _failed(f"internal error: {type(error).__name__}: {error} (--debug shows where)", 1, debug)
    return code if isinstance(code, int) else 0


def _tell(error: BaseException) -> None:
    """What is left of the work, even where nothing else is to be said (-q): files of any size may be hidden."""
    cause: BaseException | None = error
    while cause is not None:
        for note in getattr(cause, "__notes__", ()):
            click.echo(f"spp-fx: {note}", err=True)
        cause = cause.__cause__


def _failed(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    click.echo(f"spp-fx: {message}", err=True)
    return code
