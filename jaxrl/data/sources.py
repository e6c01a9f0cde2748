"""Where records come from: JSON Lines files, any iterable of dictionaries, a Hugging Face data set."""

import difflib
import glob
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

Record = dict[str, Any]
Source = str | Path | Iterable[Any]


class Line(dict):
    """A record that knows the file and line it came from: `where` is "data.jsonl:7"."""

    __slots__ = ("where",)

    def __init__(self, record: Mapping[str, Any], where: str):
        super().__init__(record)
        self.where = where


def read_records(source: Source, *, require: Sequence[str] = ()) -> list[Record]:
    """Return the records of any source.

    source: a JSON Lines file, a glob pattern ("data/*.jsonl", in the order of names) or a list of both; an
      iterable of dictionaries; one split of a Hugging Face data set, in memory or a stream; or a dictionary of
      columns {"prompt": [...], "answer": [...]}.
    require: columns that every record must have.

    Of a Hugging Face data set the rows are read without its format (NumPy, PyTorch, ...). Its tables give every
    message or tool the keys of all of them, null where it had none: nulls inside a column are left out, but for
    `content`, and for what the data set keeps as JSON.

    Raises ValueError, naming file and line or the record, as `read_jsonl`; or if the source is none of these.
    """
    if isinstance(source, str | Path):
        return [record for path in find_files(source) for record in read_jsonl(path, require=require)]
    if isinstance(source, list | tuple) and source and all(isinstance(entry, str | Path) for entry in source):
        return [record for entry in source for record in read_records(entry, require=require)]
    rows = _rows_of_columns(source) if isinstance(source, Mapping) else source
    rows = _rows_of_tables(rows) if hasattr(rows, "with_format") else rows
    if not isinstance(rows, Iterable):
        raise ValueError(f"the data is a {type(source).__name__}; expected a file or an iterable of dictionaries")
    records = []
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(
                f"record {i} is {excerpt(row)} ({type(row).__name__}), expected a dictionary of columns. Of a pandas "
                "frame pass frame.to_dict('records')"
            )
        with named(place(row, i)):
            check_columns(row, require)
        records.append(row if isinstance(row, dict) else dict(row))
    if not records:
        raise ValueError("the data holds no record; expected at least one dictionary of columns")
    return records


def find_files(pattern: str | Path) -> list[Path]:
    """Return the files of a path or glob pattern, sorted. Raises ValueError if there is none, or for a folder."""
    if Path(pattern).exists() or not glob.has_magic(str(pattern)):
        return [_file(pattern)]
    found = [Path(name) for name in sorted(glob.glob(str(pattern), recursive=True)) if Path(name).is_file()]
    if not found:
        raise ValueError(f"no file matches {pattern}; expected at least one JSON Lines file")
    return found


def read_jsonl(path: str | Path, *, require: Sequence[str] = ()) -> list[Record]:
    """Return the records of a JSON Lines file: UTF-8 (a byte order mark is allowed), blank lines skipped.

    require: columns that every record must have.

    Each record knows its file and line (`Line`), so that a later complaint names them too. Raises ValueError
    naming the file and line if a line is not UTF-8, not JSON or not an object, names a column twice, if a
    required column is missing (with the columns found and the nearest name), or if the file holds no record.
    """
    path, records = _file(path), []
    with path.open("rb") as lines:  # as text it would also split at other line ends, legal inside JSON strings
        for number, line in enumerate(lines, start=1):
            record = _read_line(line, path, number, require)
            if record is not None:
                records.append(record)
    if not records:
        raise ValueError(f"{path} holds no record; expected one JSON object per line")
    return records


class JsonLines(Sequence[Record]):
    """The records of JSON Lines files too large for memory: only where lines begin is kept, records are read when
    asked for.

    paths: a file, a glob pattern or a list of both. require: columns that every record must have.

    A malformed line is an error, as in `read_jsonl`, when it is read.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path], *, require: Sequence[str] = ()):
        paths = [paths] if isinstance(paths, str | Path) else paths
        self.files = [path for entry in paths for path in find_files(entry)]
        self.require = tuple(require)
        places = []
        for file, path in enumerate(self.files):
            start = 0
            with path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        places.append((file, start, number))
                    start += len(line)
        if not places:
            raise ValueError(f"{', '.join(map(str, self.files))} holds no record; expected one JSON object per line")
        self._places = np.array(places, np.int64)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        file, start, number = map(int, self._places[index])
        with self.files[file].open("rb") as lines:
            lines.seek(start)
            record = _read_line(lines.readline(), self.files[file], number, self.require)
        if record is None:
            raise ValueError(f"{self.files[file]}:{number}: the line has gone: the file changed since it was opened")
        return record


@contextmanager
def named(where: str):
    """Put `where` (a file and line, or a record) before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def place(record: Mapping[str, Any], number: int) -> str:
    """Where a record stands, for messages: its file and line if it was read from one, else its number."""
    return record.where if isinstance(record, Line) else f"record {number}"


def check_columns(record: Mapping[str, Any], columns: Sequence[str]) -> None:
    """Raise ValueError if a record lacks one of `columns`, naming the columns it has and the nearest."""
    for column in columns:
        if column not in record:
            near = difflib.get_close_matches(column, record, n=1)
            hint = f"did you mean {near[0]!r}? Rename it" if near else f"add {column!r} to every record"
            raise ValueError(f"no column {column!r}; found {sorted(record)}. {hint[0].upper() + hint[1:]}")


def excerpt(value: Any, length: int = 40) -> str:
    """A value for a message: in quotes, and not too long."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except ValueError:  # an integer of thousands of digits, a dictionary that holds itself
        text = f"<{type(value).__name__}>"
    return repr(text if len(text) <= length else text[: length - 3] + "...")


def _file(path: str | Path) -> Path:
    """The path, if a file stands there."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected a JSON Lines file, or a pattern such as {path}/*.jsonl")
    if not path.is_file():
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        hint = f". Did you mean {path.parent / near[0]}?" if near else ""
        raise ValueError(f"no file {path}; expected a JSON Lines file, one JSON object per line{hint}")
    return path


def _rows_of_tables(data: Any) -> Iterable[Record]:
    """The rows of a Hugging Face `Dataset` or `IterableDataset`, as they were before they became Arrow tables."""
    kinds = data.features or {}
    return ({name: _as_written(x, kinds.get(name)) for name, x in row.items()} for row in data.with_format(None))


def _as_written(value: Any, kind: Any) -> Any:
    """A value without the nulls of Arrow's structs. kind: of `datasets`: a dictionary is a struct, what has a `feature`
    a list; None is not known, and every dictionary may be a struct."""
    if isinstance(value, dict) and (kind is None or isinstance(kind, dict)):
        kept = {name: x for name, x in value.items() if x is not None or name == "content"}
        return {name: _as_written(x, (kind or {}).get(name)) for name, x in kept.items()}
    if isinstance(value, list) and (kind is None or hasattr(kind, "feature")):
        return [_as_written(x, getattr(kind, "feature", None)) for x in value]
    return value


def _rows_of_columns(columns: Mapping[str, Any]) -> Iterable[Record]:
    of_table = lambda x: isinstance(x, Sequence) and hasattr(x, "features")  # one column of a Hugging Face `Dataset`
    read = lambda x: [_as_written(value, x.features) for value in x] if of_table(x) else x
    columns = {name: read(column) for name, column in columns.items()}
    lists = {name: column for name, column in columns.items() if isinstance(column, list | tuple | np.ndarray)}
    if len(lists) < len(columns):
        splits = sorted(set(columns) - set(lists))
        raise ValueError(
            f"the data is a dictionary whose {splits} hold no list of values. If these are the splits of a data set, "
            f"choose one: data[{splits[0]!r}]. Else expected columns, {{'prompt': [...], 'answer': [...]}}"
        )
    lengths = {name: len(column) for name, column in lists.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the columns have different lengths: {lengths}; expected one value of each for every record")
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


_BINARY = {
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
    b"\x1f\x8b": "compressed by gzip: unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"PAR1": "Parquet: load it with `datasets` or pandas and pass the records",
}


def _read_line(line: bytes, path: Path, number: int, require: Sequence[str]) -> Record | None:
    where = f"{path}:{number}"
    with named(where):
        record = _parse_line(line, first=number == 1)
        if record is None:
            return None
        check_columns(record, require)
    return Line(record, where)


def _parse_line(line: bytes, *, first: bool) -> Record | None:
    for magic, what in _BINARY.items():
        if first and line.startswith(magic):
            raise ValueError(f"the file begins like {what}. Expected JSON Lines in UTF-8")
    try:
        text = line.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"byte 0x{line[error.start]:02x} at byte {error.start + 1} is not UTF-8. Save the file as UTF-8"
        ) from None
    if not text:
        return None
    try:
        record = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_integer)
    except json.JSONDecodeError as error:
        found = f"found {excerpt(text[error.pos :], 20)}" if error.pos < len(text) else "the line ends there"
        raise ValueError(f"column {error.colno}: {error.msg}; {found}. {_advice(text, error.msg, first)}") from None
    except RecursionError:
        raise ValueError("lists or objects are nested too deep to be read; expected text columns") from None
    if not isinstance(record, dict):
        array, record = isinstance(record, list), record if len(str(record)) < 40 else excerpt(record)
        advice = f". {_advice(text, '', first)}" if array and first else ""
        raise ValueError(
            f"found {'a list' if array else repr(record)}, expected one JSON "
            f'object per line, such as {{"prompt": "1+1=", "answer": "2"}}{advice}'
        )
    if "\\ud" in text.lower():
        _no_half_characters(record)
    return record


def _unique(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object; expected each once. Remove or rename one")
    return record


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON; expected a number or null. Remove the record or write null")


def _integer(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # Python's own limit, against texts that take minutes to convert
        raise ValueError(f"an integer has {len(digits)} digits; expected at most a few thousand. Quote it") from None


def _no_half_characters(record: Record) -> None:
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"half a character, \\u{ord(error.object[error.start]):04x}, stands in a text (a surrogate without its "
            "partner); expected whole characters. Was a text cut by bytes or UTF-16 units?"
        ) from None


def _advice(text: str, fault: str, first: bool) -> str:
    """What to do about a line that is no JSON object."""
    if "\x00" in text:
        return "The file looks like UTF-16: save it as UTF-8"
    if first and text.startswith("["):
        return (
            "The file looks like one JSON array: write each record as one JSON object on one line, with  "
            'python -c "import json, sys; [print(json.dumps(r)) for r in json.load(sys.stdin)]" < old.json > new.jsonl'
        )
    if text == "{":
        return "The record seems to go on on the next line: write each record as one JSON object on one line"
    if fault == "Extra data":
        return "A second value stands on the line: write each record as one JSON object on one line"
    if fault.startswith("Invalid control character"):
        return "A raw tab or line break stands inside a text: write \\t or \\n"
    return "Write each record as one JSON object on one line, with double quotes"
