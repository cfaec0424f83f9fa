"""Settings of a recipe from its YAML file and flags, and an end in one line where they, or the data, are wrong."""

import dataclasses
import math
import sys
import types
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

from rlhf.leaving import end_of_rank
from rlhf.nonfinite import NonFiniteError
from rlhf.operator_builds import check_builds
from rlhf.reward_calls import RewardError

YES_NO = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
# Settings of transformers that are declared as text and take a yes or no as well.
TEXT_OR_BOOL = {"resume_from_checkpoint"}
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults, and the text above as it is written."""


class RecipeParser(TrlParser):
    """TRL's parser of YAML files and flags, with every value of the file held against the type of its setting.

    argparse checks flags only: a list where a number belongs would fail somewhere in the middle of the run.
    """

    def __init__(self, groups: Sequence[type] | type, **kwargs: Any):
        super().__init__(groups, **{"formatter_class": HelpFormatter} | kwargs)
        groups = [groups] if isinstance(groups, type) else groups
        self.hints = {name: hint for group in groups for name, hint in get_type_hints(group).items()}
        self.defaults = {field.name: field.default for group in groups for field in dataclasses.fields(group)}

    def parse_args_and_config(self, args: Sequence[str] | None = None, **kwargs: Any) -> tuple:
        """As in TRL.

        Raises:
            ValueError, OSError: the file cannot be read or holds no settings, a setting is unknown or of another type,
                or settings do not fit together.
        """
        given = sys.argv[1:] if args is None else args
        flags = [part for flag in given for part in (flag.split("=", 1) if flag.startswith("--config=") else [flag])]
        if flags[-1:] == ["--config"]:
            raise ValueError("--config takes the path of a YAML file.")
        try:
            return super().parse_args_and_config(flags, **kwargs)
        except UnicodeDecodeError as error:
            raise ValueError(f"the config file is not UTF-8 ({error}).") from error
        except (ValueError, OSError):
            raise
        except yaml.YAMLError as error:
            raise ValueError(f"the config file is not YAML: {' '.join(str(error).split())}") from error
        # Settings are all that is read here, so whatever a library makes of them is about the settings.
        except Exception as error:
            raise ValueError(f"these settings do not work together ({type(error).__name__}: {error})") from error

    def set_defaults_with_config(self, **settings: Any) -> list[str]:
        """As in TRL, with every value converted to the type of its setting."""
        unknown = sorted(set(settings) - set(self.hints))
        if unknown:
            raise ValueError(f"the config file has the unknown settings {', '.join(unknown)}; --help lists all.")
        return super().set_defaults_with_config(
            **{name: self._converted(name, value) for name, value in settings.items()}
        )

    def _converted(self, name: str, value: Any) -> Any:
        if value is None and self.defaults[name] is None:
            return None
        if isinstance(value, bool) and name in TEXT_OR_BOOL:
            return value
        try:
            return convert(value, self.hints[name])
        except (TypeError, ValueError, OverflowError):
            quotes = "; put it into quotes" if isinstance(value, bool) else ""
            raise ValueError(
                f"{name} in the config file must be {in_words(self.hints[name])}, got {repr(value)[:80]}{quotes}."
            ) from None

    def error(self, message: str) -> None:
        """One line, not the hundreds of a usage message."""
        raise SystemExit(f"error: {message}; --help lists every setting")


def convert(value: Any, hint: Any) -> Any:
    """A value of a YAML file as what a type hint asks for: YAML 1.1 reads `1e-6` as text and `2024` as a number.

    Raises:
        ValueError, TypeError, OverflowError: it cannot be.
    """
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return _first_that_fits(value, inner)
    if kind is Literal:
        if value not in inner:
            raise ValueError(value)
        return value
    if hint is list or kind is list:
        if isinstance(value, dict):
            raise TypeError(value)
        values = value if isinstance(value, list) else [value]
        return [convert(part, inner[0]) for part in values] if inner else values
    if hint is dict or kind is dict:
        if not isinstance(value, dict):
            raise TypeError(value)
        return value
    if hint is bool:
        return _yes_no(value)
    if hint is int:
        return _whole(value)
    if hint is float:
        if isinstance(value, bool):
            raise TypeError(value)
        return float(_scalar(value, str, int, float))
    if hint is str:
        if isinstance(value, bool):
            raise TypeError(value)
        return str(_scalar(value, str, int, float))
    return hint(value) if isinstance(hint, type) and issubclass(hint, Enum) else value


def in_words(hint: Any) -> str:
    """A type hint as a user would say it."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(in_words(part) for part in inner if part is not type(None)))
    if kind is Literal:
        return " or ".join(map(repr, inner))
    if hint is list or kind is list:
        return f"a list, each {in_words(inner[0])}" if inner else "a list"
    return WORDS.get(hint) or WORDS.get(kind) or "another value"


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with `error: ...` where the input is at fault, without a traceback that would bury it.

    Python's development mode (PYTHONDEVMODE=1) shows the traceback all the same.
    """
    try:
        yield
    # The last two end a training that cannot go on, and say what was saved and what to do.
    except (ValueError, OSError, NonFiniteError, RewardError) as error:
        raise SystemExit(f"error: {error}") from (error if sys.flags.dev_mode else None)


def run(main: Callable[..., None], groups: Sequence[type] | type, description: str | None, *flags: str) -> None:
    """What a recipe does when it is started: settings, then `main` with one argument per group."""
    with end_of_rank(), one_line_errors():
        check_builds()
        main(*RecipeParser(groups, description=description).parse_args_and_config(list(flags) or None))


def _first_that_fits(value: Any, hints: Sequence[Any]) -> Any:
    if value is None and type(None) in hints:
        return None
    for hint in hints:
        # A value that already has one of the types stays what it is.
        if isinstance(hint, type) and type(value) is hint:
            return value
    for hint in hints:
        if hint is type(None):
            continue
        try:
            return convert(value, hint)
        except (TypeError, ValueError, OverflowError):
            continue
    raise ValueError(value)


def _yes_no(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if not isinstance(value, str | int) or str(value).lower() not in YES_NO:
        raise ValueError(value)
    return YES_NO[str(value).lower()]


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError(value)
    if isinstance(value, float):
        if not math.isfinite(value) or value != int(value):
            raise ValueError(value)
        return int(value)
    return int(value)


def _scalar(value: Any, *kinds: type) -> Any:
    if not isinstance(value, kinds):
        raise TypeError(value)
    return value
