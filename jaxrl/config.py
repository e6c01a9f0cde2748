"""Configuration: a frozen dataclass is the single source; flags, a TOML file, JSON and Python each fill it.

    @dataclass(frozen=True)
    class Config:
        \"\"\"Post-train by GRPO.\"\"\"

        learning_rate: float = 3e-4
        \"\"\"Peak step size of AdamW.\"\"\"

    config = parse(Config, ["--config", "run.toml", "--learning-rate", "1e-3"], prog="jaxrl train grpo")

Flags are made by tyro, which takes the help from the docstrings of the fields. Derived values are properties
of the dataclass, never written back.
"""

import dataclasses
import difflib
import sys
import tomllib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def parse(config: type[T] | T, argv: Sequence[str], *, prog: str | None = None, description: str | None = None) -> T:
    """Fill a config from command-line flags, over a TOML file, over defaults.

    config: a frozen dataclass, or an instance whose values are the defaults.
    argv: flags, `--learning-rate 1e-3` or `--learning_rate=1e-3`, nested as `--model.depth 2`. `--config
      FILE` reads defaults from a TOML file whose tables are the nested dataclasses.

    Returns the config. Exits with code 2 and a message on the standard error, without a traceback, if a flag
    or key is unknown (the nearest names are offered), a value has the wrong type, or the dataclass refuses
    the values; with code 0 after `--help`.
    """
    import tyro

    cls: Any = config if isinstance(config, type) else type(config)
    default: Any = tyro.MISSING_NONPROP if isinstance(config, type) else config
    text = [
        description or cls.__doc__ or "",
        "--config FILE reads defaults from a TOML file; flags override it.",
    ]
    try:
        file, flags = take(list(argv), "--config")
        if file is not None:
            default = _fill(config, read_toml(file), source=str(file), missing=tyro.MISSING)
        return tyro.cli(cls, args=flags, prog=prog, description="\n\n".join(text), default=default)
    except ValueError as error:
        print(f"{prog or cls.__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def from_toml(config: type[T] | T, path: str | Path) -> T:
    """Return the config with a TOML file's values over its defaults. Raises ValueError as `from_json`."""
    return _fill(config, read_toml(path), source=str(path))


def to_json(config: Any) -> dict[str, Any]:
    """Return a config as a plain nested dictionary that `json.dumps` takes, every field resolved."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def from_json(config: type[T] | T, values: dict[str, Any], *, source: str = "config") -> T:
    """Return the config with `values` (a nested dictionary, as `to_json` gives) over its defaults.

    Raises ValueError, naming `source` and the key, for an unknown key (with the nearest name), a value of the
    wrong type, or a field without default that has no value.
    """
    return _fill(config, values, source=source)


def read_toml(path: str | Path) -> dict[str, Any]:
    """Return the content of a TOML file. Raises ValueError naming the file and the place of an error."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror}); expected the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None


_TAKES = {
    "--resume": "a run folder",
    "--out": "a run folder",
    "--env": "an environment",
    "--config": "the path of a TOML file",
}


def take(argv: list[str], flag: str) -> tuple[str | None, list[str]]:
    """Takes `flag VALUE` (or `flag=VALUE`) out of the arguments."""
    for index, word in enumerate(argv):
        if word == flag:
            if index + 1 == len(argv):
                raise ValueError(f"{flag} takes {_TAKES[flag]}, got nothing after it")
            return argv[index + 1], argv[:index] + argv[index + 2 :]
        if word.startswith(flag + "="):
            return word.removeprefix(flag + "="), argv[:index] + argv[index + 1 :]
    return None, argv


def _fill(config: Any, values: dict[str, Any], *, source: str, prefix: str = "", missing: Any = None) -> Any:
    """Put a nested dictionary's values over a dataclass's defaults (or an instance's), checking types."""
    cls = config if isinstance(config, type) else type(config)
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    filled = {} if isinstance(config, type) else {name: getattr(config, name) for name in fields}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
            hint = f"did you mean {prefix + near[0]!r}?" if near else f"known keys: {', '.join(fields)}"
            raise ValueError(f"{source}: unknown key {prefix + key!r} for {cls.__name__}; {hint}")
        default = filled.get(name, _default(fields[name]))
        convert_in = {"source": source, "key": prefix + name, "default": default, "missing": missing}
        filled[name] = _convert(hints[name], value, **convert_in)
    for name, field in fields.items():
        if name not in filled and _default(field) is dataclasses.MISSING:
            if missing is None:
                raise ValueError(f"{source}: no value for {prefix + name!r} of {cls.__name__}, which has no default")
            filled[name] = missing
    try:
        return cls(**filled)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _convert(hint: Any, value: Any, *, source: str, key: str, default: Any, missing: Any) -> Any:
    """Return a TOML or JSON value as the annotated type says; no conversion loses anything."""
    again = {"source": source, "key": key, "default": default, "missing": missing}
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _convert(args[0], value, **again)
    if origin in (typing.Union, types.UnionType):
        if isinstance(value, dict) and dataclasses.is_dataclass(default):
            return _convert(type(default), value, **again)
        if isinstance(value, dict):  # the smallest that has all its keys
            sizes = {c: [f.name for f in dataclasses.fields(c)] for c in args if dataclasses.is_dataclass(c)}
            args = (
                tuple(sorted((c for c in sizes if value.keys() <= set(sizes[c])), key=lambda c: len(sizes[c]))) or args
            )
        for choice in args:
            try:
                return _convert(choice, value, **again)
            except ValueError:
                if choice is args[-1] or (isinstance(value, dict) and dataclasses.is_dataclass(choice)):
                    raise
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        base = default if isinstance(default, typing.cast(type, hint)) else hint
        return _fill(base, value, source=source, prefix=key + ".", missing=missing)
    if origin in (tuple, list) and isinstance(value, list):
        items = args[:1] * len(value) if origin is list or args[-1:] == (...,) else args
        if len(items) == len(value):
            keys = (f"{key}[{i}]" for i in range(len(value)))
            return origin(_convert(*hv, **again | {"key": k}) for k, *hv in zip(keys, items, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {k: _convert(args[1], v, **again | {"key": f"{key}.{k}"}) for k, v in value.items()}
    if origin is typing.Literal and any(value == a and type(value) is type(a) for a in args):
        return value
    if hint is Any or (hint in (None, type(None)) and value is None):
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint in (bool, int, str) and type(value) is hint:
        return value
    name = str(hint) if origin or not isinstance(hint, type) else hint.__name__
    if origin is typing.Literal:
        near = difflib.get_close_matches(str(value), [str(a) for a in args], n=1)
        name = f"one of {list(args)}" + (f" (did you mean {near[0]!r}?)" if near else "")
    raise ValueError(f"{source}: {key!r} is {value!r} ({type(value).__name__}), expected {name}")


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_json(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    raise ValueError(f"a config holds values that JSON can hold, got {value!r} ({type(value).__name__})")
