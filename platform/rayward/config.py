"""Settings: frozen dataclasses whose field comments are the help text; a script's last line makes it a command.

    @dataclass(frozen=True)
    class Settings:
        source: str                                   # folder of rollouts
        min_gap: float = 0.0                          # least difference of rewards between the two sides of a pair
        render: RenderSettings = RenderSettings()     # nested settings are reached with --set render.max_length=512

    def main(settings: Settings) -> None: ...

    if __name__ == "__main__":
        command(main)

gives  `--source S --min-gap 0.5 --max-length 512 --config FILE.yaml --set render.max_length=512 --dry-run --help`. What is said last wins,
in this order: the defaults, the file, `--set`, the named options. Where there are one or two groups of nested settings their fields are
options too; where there are more, only `--set group.name=` reaches them. Unknown names fail with a suggestion.

Help says what kind of value each takes (`kind_of`). Where a number stands for "found out by itself" (AUTO), the word `auto` means that
number: what is resolved, and every digest of it, is the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import inspect
import io
import json
import os
import re
import shutil
import sys
import textwrap
import tokenize
import types
import typing
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rayward.errors import Interrupted, RaywardError, SettingsError, UserError

T = TypeVar("T")

AUTO: dict[str, int] = {  # settings in which a number says: found out by itself
    "batch.micro_tokens": 0,  # what fits into the GPU
    "train.validate_every": 0,  # five times a run
    "train.checkpoint_every": 0,  # ten times a run
    "lora.alpha": 0,  # twice the rank
    "parts": 0,  # by size
    "gpus": -1,  # one where the cluster has any
    "gpus_per_worker": -1,
    "wait_s": -1,  # by whether the cluster is busy or too small
}


def suggest(name: str, known: Sequence[str]) -> str:
    """A way out for a name that is not known.

    >>> suggest("bradly_terry", ["bradley_terry", "plackett_luce"])
    'did you mean bradley_terry? Known: bradley_terry, plackett_luce'
    """
    close = difflib.get_close_matches(name, known, n=1)
    return (f"did you mean {close[0]}? " if close else "") + "Known: " + ", ".join(sorted(known))


def choose(table: Mapping[str, T], name: str, what: str) -> T:
    """The entry of a table by name, or the user's own as `module:attribute`.

    >>> choose({"one": 1}, "one", "number")
    1
    >>> choose({"one": 1}, "math:pi", "number")
    3.141592653589793
    >>> choose({"one": 1}, "onne", "number")
    Traceback (most recent call last):
    rayward.errors.SettingsError: number=onne is not known
      -> did you mean one? Known: one; or your own as module:name
    """
    if name in table:
        return table[name]
    module, colon, attribute = name.partition(":")
    if colon:
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError, TypeError) as error:  # the last two: "" and "." are no modules
            raise SettingsError(f"{what}={name} cannot be imported: {error}", "is the module on PYTHONPATH?") from None
    raise SettingsError(f"{what}={name} is not known", suggest(name, list(table)) + "; or your own as module:name")


# ------------------------------------------------------------------------------------------ from words to a settings object


def resolve(cls: type[T], given: Mapping[str, Any], where: str = "") -> T:
    """Build settings of class `cls` from plain values (YAML, `--set`, options): nested, typed, with names checked.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Body:
    ...     name: str
    ...     width: int = 64
    >>> resolve(Body, {"name": "a", "width": "128"})
    Body(name='a', width=128)
    >>> resolve(Body, {"name": "a", "widht": 1}, where="body.")
    Traceback (most recent call last):
    rayward.errors.SettingsError: body.widht is not a setting
      -> did you mean width? Known: name, width
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    for name in given:
        if name not in fields:
            raise SettingsError(f"{where}{name} is not a setting", suggest(str(name), list(fields)))
    missing = [n for n, f in fields.items() if n not in given and f.default is f.default_factory is dataclasses.MISSING]
    if missing:
        options = " ".join(f"--{where}{n.replace('_', '-')} ..." for n in missing)
        raise SettingsError(f"missing: {', '.join(where + n for n in missing)}", f"add {options}, or put it into --config FILE.yaml")
    values = {name: convert(hints[name], value, where + name) for name, value in given.items()}
    try:
        return cls(**values)
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(f"{where.rstrip('.') or 'settings'}: {error}") from None


def convert(kind: Any, value: Any, where: str) -> Any:
    """A plain value as the annotated type, or SettingsError that names the setting, the value and the type.

    >>> convert(int, "3", "steps"), convert(bool, "no", "shuffle"), convert(tuple[str, ...], "a,b", "names")
    (3, False, ('a', 'b'))
    >>> convert(int, "3.5", "steps")
    Traceback (most recent call last):
    rayward.errors.SettingsError: steps='3.5' is not a whole number
    >>> convert(float, "auto", "gpus_per_worker")
    -1.0
    """
    origin = get_origin(kind)
    if dataclasses.is_dataclass(kind):
        if isinstance(value, kind):  # type: ignore[arg-type]
            return value
        if isinstance(value, str) and value.startswith('{"'):
            with contextlib.suppress(ValueError):
                value = json.loads(value)
        if not isinstance(value, Mapping):
            raise SettingsError(f"{where}={value!r} is a group of settings", f"name one: {where}.NAME=VALUE")
        return resolve(kind, value, where + ".")  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        nothing = value is None or (isinstance(value, str) and value.lower() in ("none", "null", ""))
        if nothing and type(None) in get_args(kind):
            return None
        return convert(next(a for a in get_args(kind) if a is not type(None)), value, where)
    if origin is Literal:
        if value not in get_args(kind):
            raise SettingsError(f"{where}={value!r} is not one of the choices", suggest(str(value), [str(a) for a in get_args(kind)]))
        return value
    if origin is tuple:
        if value is None or isinstance(value, Mapping):
            raise SettingsError(f"{where}={value!r} is not a list of values", f"write {where}=a,b")
        if isinstance(value, str):
            value = [part.strip() for part in value.strip("[]").split(",") if part.strip()]
        parts = value if isinstance(value, list | tuple) else [value]
        return tuple(convert(get_args(kind)[0], p, where) for p in parts)
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}
        if isinstance(value, bool):
            return value
        if str(value).lower() in words:
            return words[str(value).lower()]
        raise SettingsError(f"{where}={value!r} is neither true nor false")
    if kind in (int, float):
        if value == "auto" and where in AUTO:
            return kind(AUTO[where])
        try:
            if isinstance(value, bool):
                raise ValueError
            if kind is int and isinstance(value, str):
                with contextlib.suppress(ValueError):
                    return int(value)  # exact, however long
            number = float(value)
            if kind is float:
                return number
            if number != int(number):
                raise ValueError
            return int(value) if isinstance(value, int) else int(number)
        except (TypeError, ValueError, OverflowError):
            what = f"a {'whole ' if kind is int else ''}number{' or auto' if where in AUTO else ''}"
            raise SettingsError(f"{where}={value!r} is not {what}") from None
    if kind is str:
        if value is None or isinstance(value, Mapping | list):
            raise SettingsError(f"{where}={value!r} is not a text")
        return str(value)
    return value


def as_dict(settings: Any) -> dict[str, Any]:
    """Settings as plain values that YAML, JSON and MLflow take; tuples become lists.

    >>> @dataclasses.dataclass(frozen=True)
    ... class S:
    ...     names: tuple[str, ...] = ("a",)
    >>> as_dict(S())
    {'names': ['a']}
    """

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {name: plain(v) for name, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return value

    return plain(settings)


def public(text: str) -> str:
    """A text without the user and password that stand in a URL.

    >>> public("s3://KEY:SECRET@bucket/rows"), public("a@b")
    ('s3://bucket/rows', 'a@b')

    Also of a password that should have been escaped, which may hold an @ or a slash:

    >>> public("postgresql://u:p@ss@host/db"), public("postgresql://u:p/ss@host/db"), public("http://host:5000/a@b")
    ('postgresql://host/db', 'postgresql://host/db', 'http://host:5000/a@b')
    """
    return _CREDENTIALS.sub("", text)


_CREDENTIALS = re.compile(r"""(?<=://)(?:[^/\s,"']*@|[^/@\s:,]*:(?!\d+(?:[/?#,]|$))[^\s,"']*?@)""")


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names.

    >>> flatten({"a": 1, "b": {"c": 2}})
    {'a': 1, 'b.c': 2}
    """
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, group by group.

    >>> merge({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}})
    {'a': {'x': 1, 'y': 3}}
    """
    merged = dict(base)
    for name, value in over.items():
        below = merged.get(name)
        merged[name] = merge(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return merged


def _nest(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1}` as `{"a": {"b": 1}}`."""
    nested: dict[str, Any] = {}
    for name, value in dotted.items():
        *groups, last = name.split(".")
        at = nested
        for group in groups:
            at = at.setdefault(group, {})
        at[last] = value
    return nested


def parse_settings(text: str, what: str, example: str = '{"temperature": 0.7}') -> dict[str, Any]:
    """The settings of something pluggable from JSON text, the form in which commands and manifests have them.

    >>> parse_settings('{"slip": 0.3}', "policy_settings")
    {'slip': 0.3}
    >>> parse_settings("[1]", "policy_settings")
    Traceback (most recent call last):
    rayward.errors.SettingsError: policy_settings='[1]' is not a JSON object of settings
      -> write e.g. policy_settings={"temperature": 0.7}
    """
    way_out = f"write e.g. {what}={example}"
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise SettingsError(f"{what}={text!r} is not JSON: {error}", way_out) from None
    if not isinstance(settings, dict):
        raise SettingsError(f"{what}={text!r} is not a JSON object of settings", way_out)
    return settings


def parse_sets(assignments: Sequence[str]) -> dict[str, Any]:
    """`a.b=c` words as nested plain values; the value is read as YAML, so `null`, `true` and `[1, 2]` mean what they say.

    >>> parse_sets(["train.lr=1e-4", "model.pooling=mean"])
    {'train': {'lr': '1e-4'}, 'model': {'pooling': 'mean'}}
    """
    import yaml

    given: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            raise SettingsError(f"--set {assignment}: there is no name=value in it", "write --set group.name=value")
        try:
            value = (
                yaml.safe_load(text) if text and text != "{}" and not text.startswith('{"') else text
            )  # a JSON object stays the text it is
        except yaml.YAMLError:
            value = text
        nested: Any = value
        for part in reversed(name.split(".")):
            nested = {part: nested}
        given = merge(given, nested)
    return given


def read_file(path: str) -> dict[str, Any]:
    """A YAML file of settings as nested plain values."""
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file) or {}
    except OSError as error:
        raise SettingsError(f"--config {path} cannot be read: {error.strerror}", "give a file of `name: value` lines") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"--config {path} is not YAML: {error}", "write one `name: value` a line; --dry-run prints such a file"
        ) from None
    if not isinstance(content, dict):
        raise SettingsError(f"--config {path} holds a {type(content).__name__}", "write one `name: value` a line")
    return content


# ------------------------------------------------------------------------------------------------------- a typer command


def field_help(cls: type) -> dict[str, str]:
    """The comment behind every field of a dataclass, and comment lines that go on below it."""
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        return {}
    names = {f.name for f in dataclasses.fields(cls)}
    help_of: dict[str, str] = {}
    current = ""
    starts_line = True
    for token in tokenize.generate_tokens(io.StringIO(inspect.cleandoc(source)).readline):
        if token.type == tokenize.NAME and starts_line and token.string in names:
            current = token.string
        elif token.type == tokenize.COMMENT and current:
            help_of[current] = (help_of.get(current, "") + " " + token.string.lstrip("# ")).strip()
        if token.type in (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            starts_line = True
        elif token.type != tokenize.COMMENT:
            starts_line = False
    return help_of


_PLACE = re.compile(r"(?:^|\ban? |\bor |, |YAML |\.json )(?:hub )?(folder|file|place|URL|name|models:/)(?:s?\b|(?=[A-Z]))")
_PLACES = {"folder": "DIR", "file": "FILE", "place": "DIR|URL", "URL": "URL", "name": "NAME", "models:/": "models:/NAME"}


def kind_of(kind: Any, name: str, text: str) -> str:
    """What a user writes for a setting, for its help: by its type, and for a text by what its comment begins with.

    >>> kind_of(float, "train.lr", ""), kind_of(int, "batch.micro_tokens", ""), kind_of(Literal["auto", "ray"], "engine", "")
    ('<float>', '<int>|auto', 'auto|ray')
    >>> kind_of(str, "source", "a file, a folder of files, a URL of either"), kind_of(str, "space", "JSON of names"), kind_of(str, "by", "")
    ('<FILE|DIR|URL>', '<JSON>', '<text>')
    >>> kind_of(str, "model", "folder or hub name of a model, models:/NAME@ALIAS, or tiny: from scratch")
    '<DIR|NAME|models:/NAME>'
    >>> kind_of(tuple[str, ...], "names", "their names"), kind_of(bool, "train.shard", "")
    ('<text,...>', 'true|false')
    """
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return "|".join("none" if a is type(None) else kind_of(a, name, text) for a in get_args(kind))
    if origin is Literal:
        return "|".join(map(str, get_args(kind)))
    if origin is tuple:
        return kind_of(get_args(kind)[0], name, text).replace(">", ",...>")
    if kind is bool:
        return "true|false"
    if kind in (int, float):
        return f"<{kind.__name__}>" + ("|auto" if name in AUTO else "")
    if text.startswith("JSON"):
        return "<JSON>"
    places = dict.fromkeys(_PLACES[found] for found in _PLACE.findall(re.split(r":(?!/)|[;(]", text)[0]))
    return f"<{'|'.join(places)}>" if places else "<text>"


def _shown(value: Any, name: str) -> str:
    """A default as a user would write it."""
    if name in AUTO and value == AUTO[name]:
        return "auto"
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def command(main: Callable[[Any], object]) -> None:
    """Run `main(settings)` as a command whose options are the fields of its settings class."""
    import typer

    cls = next(iter(get_type_hints(main).values()))
    run, nested = _typer_function(main, cls)
    text = inspect.cleandoc(sys.modules[main.__module__].__doc__ or "").replace("\n\n    ", "\n\n\b\n    ")
    if nested:
        text += "\n\n\b\nNested settings, with their defaults:\n" + "\n".join("  " + line for one in nested for line in _folded(*one))
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(help=text, context_settings={"max_content_width": 120})(run)
    guarded(app)


def _folded(setting: str, words: str) -> list[str]:
    """A setting and what is said of it: one line for `grep`, or as many as fit into the terminal."""
    if not sys.stdout.isatty():
        return [f"{setting:<46}  {words}"]
    wide = min(shutil.get_terminal_size().columns, 140) - 4  # that help is indented by
    if wide >= 110 and len(setting) <= 46:
        first, *more = textwrap.wrap(words, wide - 48)
        return [f"{setting:<46}  {first}", *(" " * 48 + line for line in more)]
    return [setting, *("    " + line for line in textwrap.wrap(words, wide - 4))]


def _typer_function(main: Callable[[Any], object], cls: type) -> tuple[Callable[..., None], list[tuple[str, str]]]:
    """A function with one typer option per plain field, plus --config, --set and --dry-run; and a line of help per nested setting."""
    import typer

    hints, help_of = get_type_hints(cls), field_help(cls)
    parameters: list[inspect.Parameter] = []
    nested: list[tuple[str, str]] = []
    groups = [f for f in dataclasses.fields(cls) if dataclasses.is_dataclass(hints[f.name])]
    own = Counter(f.name for f in dataclasses.fields(cls)) + Counter(f.name for g in groups for f in dataclasses.fields(hints[g.name]))

    def add(name: str, option: str, kind: Any, text: str, default: Any = None, metavar: str | None = None) -> None:
        annotation = typing.Annotated[kind, typer.Option(option, help=text, show_default=False, metavar=metavar)]
        parameters.append(
            inspect.Parameter(name.replace(".", "__"), inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )

    def add_field(name: str, field: dataclasses.Field[Any], kind: Any, text: str, default: Any) -> None:
        flag, written = "--" + field.name.replace("_", "-"), kind_of(kind, name, text)
        if default is dataclasses.MISSING:
            text += " [required]"
        elif default not in (None, "", ()):
            text += f" [default: {_shown(default, name)}]"
        if kind is bool:
            add(name, f"{flag}/--no-{flag[2:]}", bool | None, text)
        else:
            add(name, flag, str | None, text, metavar=written)

    for field in dataclasses.fields(cls):
        kind, text = hints[field.name], help_of.get(field.name) or ""
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if field not in groups:
            add_field(field.name, field, kind, text, default)
            continue
        inner_hints, inner = get_type_hints(kind), field_help(kind)
        for f in dataclasses.fields(kind):
            value, words = getattr(default, f.name), inner.get(f.name) or ""
            if len(groups) <= 2 and own[f.name] == 1 and not dataclasses.is_dataclass(value):
                add_field(f"{field.name}.{f.name}", f, inner_hints[f.name], words, value)
            else:
                name = f"{field.name}.{f.name}"
                nested.append((f"--set {name}={_shown(value, name)}", f"{kind_of(inner_hints[f.name], name, words)}  {words}"))
    add("config", "--config", str | None, "a YAML file of settings", metavar="<FILE>")
    add("set_", "--set", list[str] | None, "any setting by its dotted name: --set group.name=value (repeatable)", metavar="<NAME=VALUE>")
    add("dry_run", "--dry-run", bool, "print the resolved settings and stop", False)

    def run(**options: Any) -> None:
        config, sets, dry = options.pop("config"), options.pop("set_"), options.pop("dry_run")
        given = merge(read_file(config) if config else {}, parse_sets(sets or []))
        settings: Any = resolve(cls, merge(given, _nest({n.replace("__", "."): v for n, v in options.items() if v is not None})))
        if dry:
            import yaml

            print(yaml.safe_dump(as_dict(settings), sort_keys=False, allow_unicode=True), end="")
        else:
            try:
                main(settings)
            except KeyboardInterrupt:  # before typer turns it into an exit without a word
                raise Interrupted("run the same command again, and it goes on") from None

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run, nested


def guarded(app: Callable[[], Any]) -> None:
    """Run a command line; a user's mistake is one message on stderr and exit code 2. RAYWARD_TRACEBACK=1 shows where it came from."""
    try:
        app()
    except UserError as error:
        if os.environ.get("RAYWARD_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (Interrupted, KeyboardInterrupt) as error:
        print(f"\nstopped: {error or 'run the same command again, and it goes on'}", file=sys.stderr)
        sys.exit(130)
    except RaywardError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader went away (`| head`), which is no error of ours
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        if os.environ.get("RAYWARD_TRACEBACK") or error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}\n  -> check the path, its permissions and the space left", file=sys.stderr)
        sys.exit(2)
