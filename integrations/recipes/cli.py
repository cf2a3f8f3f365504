"""The command ``geomreg``."""

import dataclasses
import difflib
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import geomreg

__all__ = ["main"]

_HERE = Path(__file__).parent
_OWN = (_HERE.parent, Path(geomreg.__file__).parent)
_OF_ENTRIES = r"--(evaluation|method\.(target_)?terms)\.[^.]+\.options\."
_SHORT = {"lr": "learning_rate", "wd": "weight_decay", "bs": "batch_size"}  # of options that people expect


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand; 0 when done, 2 with one line on standard error when something is wrong, 130 after Ctrl-C, 143 after SIGTERM
    stopped a run, which goes on when the command is given again."""
    try:
        with _warnings_on_one_line():
            return _run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        print("geomreg: interrupted; files written before stay as they were", file=sys.stderr)
        return 130
    except ImportError as error:
        if isinstance(error, ValueError):  # jsonargparse, of a class that is not imported
            print(f"geomreg: {_plain(str(error))}", file=sys.stderr)
            return 2
        print(f"geomreg: expected the quickstart's packages, got no {error.name}. Run pip install 'geomreg[quickstart]'.", file=sys.stderr)
        return 2
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        message = str(error)
        if "Original Traceback" in message:  # of a loading process: what it raised is at the end
            message = message.rpartition(f"\n{type(error).__name__}: ")[2]
        if message.startswith("Does not validate against any of the Union"):  # jsonargparse, of a part that may be null: what it lacks
            message = next((line for line in re.findall(r"^ *- (.*)", message, re.MULTILINE) if "NoneType" not in line), message)
        print(f"geomreg: {_plain(' '.join(message.split()))}", file=sys.stderr)
        return getattr(error, "status", 2)


def _run(arguments: list[str]) -> int:
    from jsonargparse import ArgumentParser, set_parsing_settings

    class Parser(ArgumentParser):  # type: ignore[misc]
        """One line for a wrong option, with the nearest known one."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            line = _plain(" ".join(str(message).split()))
            if "Got value: Namespace(" in line and (deep := [one for one in arguments if re.match(_OF_ENTRIES, one)]):
                options, _, rest = deep[0].partition(".options.")
                example = f"{options}.options '{{\"{rest.partition('=')[0]}\": ...}}'"
                print(f"geomreg: expected the options of an entry as a whole, got {deep[0]}. Write {example}.", file=sys.stderr)
                raise SystemExit(2)
            unknown = re.search(r"(?:(--)|[Oo]ption '|invalid choice: ')([A-Za-z_.]+)", line)  # on the command line, in a file
            dashes, name = ("", "") if unknown is None else (unknown[1] or "", unknown[2])
            known = [option.removeprefix("--") for action in self._actions for option in action.option_strings] if dashes else in_files
            known = [*commands] if "argument command: " in line else known
            full = ".".join(_SHORT.get(part, part) for part in name.split("."))
            near = difflib.get_close_matches(full, known, n=1) if name not in known else []
            hint = f" Did you mean {dashes}{near[0]}?" if near else " See --help."
            print(f"geomreg: {line.rstrip('.')}.{hint}", file=sys.stderr)
            raise SystemExit(2)

    from geomreg.integrations.quickstart.run import Options as QuickstartOptions
    from geomreg.integrations.quickstart.run import quickstart
    from geomreg.integrations.recipes.config import Config, DataConfig, TermConfig
    from geomreg.integrations.recipes.embed import Options as EmbedOptions
    from geomreg.integrations.recipes.embed import embed_data
    from geomreg.integrations.recipes.ensemble import EnsembleOptions, ensemble
    from geomreg.integrations.recipes.finetune import finetune_from
    from geomreg.integrations.recipes.models import Lora
    from geomreg.integrations.recipes.retrieve import RetrieveOptions, retrieve

    owners = [Config, QuickstartOptions, EmbedOptions, EnsembleOptions, RetrieveOptions]
    allowed = [f"{owner.__module__}.{owner.__qualname__}" for owner in _parts(*owners)]
    # For the whole process: no value imports anything, nor is one made to an object.
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=allowed, instantiate_subclass_spec_in_any=False)
    commands: dict[str, tuple[Callable[[Any], Any], type[Any], str]] = {
        "quickstart": (quickstart, QuickstartOptions, "plain FLYP against FLYP + DiVE on OpenMoji pictures, a few minutes on a CPU"),
        "finetune": (finetune_from, Config, "fine-tune your own CLIP, with a regularizer that keeps what it knew"),
        "ensemble": (ensemble, EnsembleOptions, "weights between a model and its fine-tuned self"),
        "retrieve": (retrieve, RetrieveOptions, "the samples of a pool that are nearest to your data, by two caches (ARF)"),
        "embed": (embed_data, EmbedOptions, "a cache of a frozen model's embeddings, for Teacher.cached"),
    }
    in_files = [field.name for entry in (DataConfig, TermConfig, Lora) for field in dataclasses.fields(entry)]  # of entries by name
    parser = Parser(prog="geomreg", description="Fine-tune embedding models without losing their geometry.")
    subcommands = parser.add_subcommands(dest="command", required=True)
    for name, (command, options, summary) in commands.items():
        sub = Parser(description=command.__doc__.splitlines()[0] if command.__doc__ else None)
        if options is Config:
            sub.add_argument("--config", action="config", help="YAML file with some of the options; several add up, later ones win")
            resume = "auto: an interrupted run of this configuration in the output folder goes on; never: no run may be there"
            sub.add_argument("--resume", choices=["auto", "never"], default="auto", help=resume)
        sub.add_class_arguments(options, as_group=False)
        subcommands.add_subcommand(name, sub, help=summary)
        if options is Config:
            in_files += [option.removeprefix("--") for action in sub._actions for option in action.option_strings]
    values = parser.instantiate(parser.parse_args(_with_shipped_files(arguments)))
    command, options, _ = commands[values.command]
    given = vars(values[values.command])
    if given.get("resume") == "never" and (given["output"] / "config.json").exists():
        raise ValueError(
            f"finetune: expected no run in {given['output']} with --resume never, got one. Delete the folder to begin afresh, "
            "choose another, or go on with --resume auto."
        )
    command(options(**{field.name: given[field.name] for field in dataclasses.fields(options)}))
    return 0


def _parts(*owners: type[Any]) -> Iterator[type[Any]]:
    """Dataclasses of options, and those within them."""
    for owner in owners:
        yield owner
        for hint in get_type_hints(owner).values():
            for one in (hint, *get_args(hint)):
                if dataclasses.is_dataclass(one) and isinstance(one, type):
                    yield from _parts(one)


def _plain(line: str) -> str:
    """Messages of jsonargparse that a reader could not place, in words of the options."""
    if match := re.search(r"[Ii]mporting '([^']*)' is not allowed", line):
        return f"expected the options of an entry, got {match[1]!r}. Write them one by one: no value here names a class or a module."
    of_text = re.search(r"^Parser key \"(.*?)\": .*Expected a <class 'str'>.* [Vv]alue: ([^\[{].*?)\.?$", line)
    of_path = re.search(r"^Parser key \"(.*?)\": Not of type Path: expected str.*, not (\w+)\.?$", line)
    if found := of_text or of_path:
        got = found[2] if of_text else f"a value of type {found[2]}"
        return f"expected {found[1]} as text, got {got}, which is none in YAML. Put it in quotes."
    return line


@contextmanager
def _warnings_on_one_line() -> Iterator[None]:
    """Those of geomreg, without file and line of source; some name the program's own line, as in a loop of one's own."""
    usual, own = warnings.formatwarning, (*_OWN, Path(sys.argv[0]))

    def formatted(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
        if any(Path(filename).is_relative_to(folder) for folder in own):
            return f"geomreg: warning: {' '.join(str(message).split())}\n"
        return usual(message, category, filename, lineno, line)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _with_shipped_files(arguments: list[str]) -> list[str]:
    """``--config method/dive`` means the file that comes with the package, unless there is one of this name.

    A method's file may not follow another file with a method: of that one, what the later does not set would stay.
    """
    folder = _HERE / "configs"
    shipped = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.yaml")}
    found, method = [], ""
    split = [part for one in arguments for part in (one.split("=", 1) if one.startswith("--config=") else [one])]
    for before, argument in zip(["", *split], split, strict=False):
        if before == "--config":
            path = Path(argument)
            if not path.is_file():  # data/imagenet may well be a folder too
                if argument not in shipped:
                    near = difflib.get_close_matches(argument, shipped, n=1)
                    hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(sorted(shipped))}."
                    raise ValueError(f"expected --config as a file or one that comes with geomreg, got {argument!r}. {hint}")
                path = shipped[argument]
                if argument.startswith("method/") and method:
                    raise ValueError(f"expected one method, got {argument} after that of {method}. Leave one out: they would mix.")
            method = argument if _has_method(path) else method
            argument = str(path)
        found.append(argument)
    return found


def _has_method(path: Path) -> bool:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        got = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise ValueError(f"expected options in YAML in {path}, got {got.rstrip('.')}. Mend the file.") from error
    if not isinstance(content, dict):
        got = "an empty file" if content is None else type(content).__name__
        raise ValueError(f"expected options by name in YAML in {path}, got {got}. Mend the file, or leave it out.")
    return "method" in content


if __name__ == "__main__":
    raise SystemExit(main())
