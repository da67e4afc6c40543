"""Reads options from yaml recipes, the environment and the command line, through fastargs.

fastargs layers the sources. This module adds what fastargs does not do: it rejects unknown names, checks all values,
orders the sources (the command line wins), and reports all problems together as one ConfigError.
"""

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import Field
from pathlib import Path
from typing import Any, NoReturn

import fastargs
import yaml
from fastargs.exceptions import ValidationError

from vitlocal.errors import ConfigError
from vitlocal.options import FLAG
from vitlocal.paths import RECIPES, find_recipe


def by_dotted_name(sections: Mapping[str, Any]) -> dict[str, Any]:
    """The options in ``sections`` as ``{"section.option": value}``. Options outside of sections keep their name."""
    flat: dict[str, Any] = {}
    for section, value in sections.items():
        inner = value if isinstance(value, dict) else {"": value}
        flat |= {f"{section}.{key}".rstrip("."): part for key, part in inner.items()}
    return flat


def plain_value(value: Any) -> Any:
    """``value`` as yaml stores it: a number, text, none, or a list of them."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return [plain_value(part) for part in value] if type(value) is tuple else str(value)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse would print the whole usage before it
        raise ConfigError(f"{message}; see --help")


class OptionReader:
    """Reads one set of options, given as ``{dotted name: dataclass field}``.

    ``flags``: further names on the command line, ``{"--split": "write.split"}``. ``renamed``: old names, which
    are errors, and new names.
    """

    def __init__(
        self,
        options: Mapping[str, Field[Any]],
        about: str,
        flags: Mapping[str, str] = {},
        renamed: Mapping[str, str] = {},
    ):
        self.problems: list[str] = []
        self.files: list[str] = []  # recipes that the command line names
        self.overrides: dict[str, str] = {}  # options that the command line sets
        self._options, self._about, self._flags, self._renamed = options, about, flags, renamed
        self._sections = ", ".join(dict.fromkeys(name.rpartition(".")[0] or name for name in options))
        self._origin: dict[str, str] = {}
        self._fastargs = fastargs.Config()
        root = fastargs.Section("", config_descriptor=self._fastargs)  # of all options, because `methods` has none
        for name, spec in options.items():
            param = fastargs.Param(spec.metadata["kind"], spec.metadata["meaning"], default=spec.default)
            param.section = root
            self._fastargs.add_entry((), name, param)

    def _parser(self, options: Mapping[str, Field[Any]]) -> argparse.ArgumentParser:
        """A parser of the command line, for these options."""
        usage = "%(prog)s [--config-file YAML] [--option VALUE ...]"
        parser = _Parser(usage=usage, description=self._about, allow_abbrev=False, add_help=False)
        parser.add_argument("--config-file", "-C", action="append", default=[], metavar="YAML",
                            help="a recipe; may be repeated, later ones win")  # fmt: skip
        parser.add_argument("-h", "--help", nargs="?", const="", metavar="SECTION",
                            help=f"shows the options, of one section or of all: {self._sections}")  # fmt: skip
        groups: dict[str, Any] = {}
        for name, spec in options.items():
            section, kind, meaning = name.rpartition(".")[0], spec.metadata["kind"], spec.metadata["meaning"]
            if section not in groups:
                groups[section] = parser.add_argument_group(section or "top level")
            takes: dict[str, Any] = {"metavar": ""}
            if kind is FLAG:  # `--run.keep_weights` without a value means true
                takes = {"nargs": "?", "const": "true", "metavar": "true|false"}
            else:
                meaning += f"; {kind.help()}"
            default = "none" if spec.default in (None, ()) else plain_value(spec.default)
            takes["help"] = f"{meaning} (default: {default})".replace("%", "%%")
            named = [flag for flag, target in self._flags.items() if target == name]
            groups[section].add_argument(f"--{name}", *named, dest=name, default=argparse.SUPPRESS, **takes)
        return parser

    def read(self, argv: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
        """The value of every option. Later sources win: environment, recipes, command line.

        Raises ConfigError with a list of all problems.
        """
        known, unknown = self._parser(self._options).parse_known_args(list(argv))
        given = vars(known)
        if (section := given.pop("help")) is not None:
            self._help(section)
        self.files = given.pop("config_file")
        for text in unknown:
            self._unknown(text.lstrip("-").split("=")[0], f"command line: {text}")
        for name in self._renamed.keys() & environment.keys():
            self._unknown(name, "environment")
        self._layer({name: environment[name] for name in self._options if name in environment}, "environment")
        for file in self.files:
            self._layer(self._recipe(file), file)
        self._layer(given, "command line")
        self.overrides, values = given, {}
        for name, spec in self._options.items():
            try:
                values[name] = self._fastargs[name]
            except ValidationError:
                got, origin = self._fastargs.content[tuple(name.split("."))], self._origin[name]
                named = [flag for flag, target in self._flags.items() if target == name and origin == "command line"]
                self.problems.append(
                    f"{(*named, name)[0]}: got {got!r} ({origin}), expected {spec.metadata['kind'].help()}"
                )
        self.check()
        return values

    def check(self) -> None:
        """Raises ConfigError with every problem found so far."""
        if self.problems:
            raise ConfigError("\n       ".join(self.problems))

    def _help(self, section: str) -> NoReturn:
        """Prints all options, or the options of ``section``, and exits."""
        shown = {name: spec for name, spec in self._options.items() if section in ("", name.rpartition(".")[0] or name)}
        if not shown:
            raise ConfigError(f"--help: there is no section '{section}'; the sections are {self._sections}")
        self._parser(shown).print_help()
        sys.exit(0)

    def _unknown(self, name: str, where: str) -> None:
        """Adds the problem that there is no option ``name``, with its new name or the most similar option."""
        section, _, key = name.rpartition(".")
        known = [*(flag.lstrip("-") for flag in self._flags), *self._options]
        initials = f"{section}.{''.join(word[:1] for word in key.split('_'))}"
        near = [initials] if initials in self._options else difflib.get_close_matches(name, known, 1, cutoff=0.5)
        near = near or [option for option in known if option.rpartition(".")[2] == key][:1]
        advice = ""
        if name in self._renamed:
            advice = f" any more; its name is now {self._renamed[name]}"
        elif near:
            advice = f"; did you mean {'--' if f'--{near[0]}' in self._flags else ''}{near[0]}?"
        self.problems.append(f"{where}: there is no option '{name}'{advice}")

    def _recipe(self, file: str, within: tuple[str, ...] = ()) -> dict[str, Any]:
        """The options that a yaml file states, on top of those of its ``base``."""
        try:
            content = yaml.safe_load(find_recipe(file).read_text(encoding="utf-8")) or {}
        except OSError as error:
            ours = {path.name: Path("rcfg") / path.name for path in RECIPES.glob("*.yaml")}
            there = ours | {path.name: path for path in Path(file).parent.glob("*.yaml")}
            near = difflib.get_close_matches(Path(file).name, there, n=1)
            self.problems.append(
                f"{file}: cannot be read as a recipe ({error.strerror})"
                + (f", which is the base of {within[-1]}" if within else "")
                + (f"; did you mean {there[near[0]]}?" if near else f"; {RECIPES} holds vitlocal's recipes")
            )
            return {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            self.problems.append(f"{file}: is not yaml: {' '.join(str(error).split())}")
            return {}
        if not isinstance(content, dict):
            self.problems.append(f"{file}: expected sections with options, got {type(content).__name__}")
            return {}
        flat: dict[str, Any] = {}
        if (base := content.pop("base", None)) is not None:  # another recipe, in the same folder, that this one changes
            path = str(find_recipe(str(base), find_recipe(file).parent))
            if not isinstance(base, str) or path in (*within, file):
                self.problems.append(f"{file}: base is {base!r}, expected the name of one other recipe, without a loop")
            else:
                flat = self._recipe(path, (*within, file))
        sections = {name.partition(".")[0] for name in self._options if "." in name}
        empty = {name for name in sections if content.get(name, "") is None}  # all its lines are comments
        flat |= by_dotted_name({name: value for name, value in content.items() if name not in empty})
        of_run = Path(file).name == "config.yaml"  # an option that it did not set may be gone since then
        for name in sorted(flat.keys() - self._options.keys()):
            if not (of_run and flat[name] is None):
                self._unknown(name, file)
            del flat[name]
        return flat

    def _layer(self, values: Mapping[str, Any], origin: str) -> None:
        # fastargs skips None, so that yaml's null could not undo an earlier recipe's value.
        stated = {name: "none" if value is None else value for name, value in values.items()}
        self._fastargs.collect(stated)
        self._origin |= dict.fromkeys(stated, origin)
