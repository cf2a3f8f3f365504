"""The command ``geomreg``."""

import difflib
import re
import sys
from typing import NoReturn

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand; 0 when done, 2 with one line on standard error when something is wrong, 130 after Ctrl-C."""
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        print("geomreg: interrupted; files written before stay as they were", file=sys.stderr)
        return 130
    except ImportError as error:
        print(f"geomreg: expected the quickstart's packages, got no {error.name}. Run pip install 'geomreg[quickstart]'.", file=sys.stderr)
        return 2
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        print(f"geomreg: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _run(arguments: list[str]) -> int:
    from jsonargparse import ArgumentParser

    class Parser(ArgumentParser):  # type: ignore[misc]
        """One line for a wrong option, with the nearest known one."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            line = " ".join(str(message).split())
            unknown = re.search(r"--([A-Za-z_]+)", line)
            known = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(f"--{unknown.group(1)}", known, n=1) if unknown else []
            hint = f" Did you mean {near[0]}?" if near and f"--{unknown.group(1) if unknown else ''}" not in known else " See --help."
            print(f"geomreg: {line.rstrip('.')}.{hint}", file=sys.stderr)
            raise SystemExit(2)

    parser = Parser(prog="geomreg", description="Fine-tune embedding models without losing their geometry.")
    commands = parser.add_subcommands(dest="command", required=True)
    from geomreg.integrations.quickstart.run import Options, quickstart

    sub = Parser(description=quickstart.__doc__.splitlines()[0] if quickstart.__doc__ else None)
    sub.add_class_arguments(Options, as_group=False)
    commands.add_subcommand("quickstart", sub, help="plain FLYP against FLYP + DiVE on OpenMoji pictures, a few minutes on a CPU")
    values = parser.parse_args(arguments)
    quickstart(Options(**vars(values.quickstart)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
