"""YAML in and out: schema version, atomic writes, and errors that name file, key path, expected and got."""

from __future__ import annotations

import difflib
import errno
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .input_error import InputError

_REQUIRED: Any = object()
MOST = 10**15  # of a whole number: above every size of a model or machine, and products of several stay finite
_MOST_DEPTH = 1000  # levels of nesting; our own files have five
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
# What to try where nothing nearer is known, by kind of file.
_REMEDIES = {
    "model": "compare with a file of profiles/catalog/models/",
    "cluster": "compare with a file of profiles/catalog/clusters/",
    "hardware profile": "compare with a file of profiles/catalog/hardware/, or measure anew: cli.py profile -o FILE",
    "plan": "put back what was edited, or plan anew: cli.py plan … -o FILE",
}


class _Loader(_SafeLoader):
    """YAML that refuses a key given twice, of which PyYAML would keep the last without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key, _ in node.value:
            own = key.start_mark.index >= node.start_mark.index  # what `<<` merges in stands further up
            if own and isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value} a second time", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class Reader:
    """A mapping under check: every key is taken once with its type and bounds, `finish` refuses the rest.

    >>> r = Reader({"devices": 8}, source="c.yaml", path="links[1]")
    >>> r.integer("devices", minimum=1)
    8
    >>> r.finish()
    """

    def __init__(self, mapping: object, *, source: str, path: str = "", remedy: str = "") -> None:
        self.source = source
        self.remedy = remedy  # what to try where nothing nearer is known
        self.path = path
        if not isinstance(mapping, Mapping):
            raise self._error("", "a mapping of keys to values", mapping)
        self._mapping: Mapping[Any, Any] = mapping
        self._taken: set[str] = set()

    def _key_path(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path and key else self.path or key

    def _error(self, key: str, expected: str, got: object, hint: str = "") -> InputError:
        return self._told(key, expected, _shown(got), hint)

    def _told(self, key: str, expected: str, got: str, hint: str = "") -> InputError:
        path = self._key_path(key)
        return InputError(
            f"{path or 'the document'} has a value that cannot be used",
            where=f"{self.source}: {path}" if path else self.source,
            expected=expected,
            got=got,
            hint=hint or self.remedy,
        )

    def fail(self, key: str, expected: str, got: object, hint: str = "") -> InputError:
        """The error for a value of the right type that contradicts something else."""
        return self._error(key, expected, got, hint)

    def refuse(self, key: str, expected: str, reasons: Sequence[str]) -> InputError:
        """The error for what rules forbid; all of `reasons` in full."""
        return self._told(key, expected, "; ".join(reasons))

    def __contains__(self, key: str) -> bool:
        return key in self._mapping

    def __iter__(self) -> Iterator[str]:
        """The mapping's keys as text, in the file's order."""
        return iter([str(key) for key in self._mapping])

    def _take(self, key: str, default: Any, expected: str) -> Any:
        self._taken.add(key)
        if key in self._mapping:
            return self._mapping[key]
        if default is _REQUIRED:
            near = difflib.get_close_matches(key, [str(k) for k in self._mapping], 1)
            raise InputError(
                f"the key {self._key_path(key)} is missing",
                where=f"{self.source}: {self.path or 'top level'}",
                expected=f"{key}: {expected}",
                got="keys " + ", ".join(map(str, self._mapping)) if self._mapping else "no keys",
                hint=f"is {near[0]!r} meant to be {key!r}?" if near else self.remedy,
            )
        return default

    def integer(self, key: str, *, minimum: int = 0, maximum: int = MOST, default: Any = _REQUIRED) -> int:
        expected = f"a whole number >= {minimum}"
        value = self._take(key, default, expected)
        if value is default and default is not _REQUIRED:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self._error(key, expected, value)
        if value > maximum:
            raise self._told(key, f"a whole number from {minimum} to {maximum:,}", f"one of {value.bit_length()} bits")
        return value

    def number(
        self, key: str, *, above: float | None = None, minimum: float | None = None, default: Any = _REQUIRED
    ) -> float:
        bound = f" > {above:g}" if above is not None else f" >= {minimum:g}" if minimum is not None else ""
        expected = f"a finite number{bound}"
        value = self._take(key, default, expected)
        if value is default and default is not _REQUIRED:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise self._error(key, expected, value)
        try:
            number = float(value)  # YAML 1.1 reads 1e-5, without a point, as text
        except (ValueError, OverflowError):
            raise self._error(key, expected, value) from None
        if not math.isfinite(number):
            raise self._error(key, expected, value)
        if (above is not None and number <= above) or (minimum is not None and number < minimum):
            raise self._error(key, expected, value)
        return number

    def boolean(self, key: str, *, default: Any = _REQUIRED) -> bool:
        value = self._take(key, default, "true or false")
        if not isinstance(value, bool):
            raise self._error(key, "true or false", value)
        return value

    def text(self, key: str, *, choices: Iterable[str] | None = None, default: Any = _REQUIRED) -> str:
        allowed = list(choices) if choices is not None else None
        expected = "one of " + ", ".join(allowed) if allowed else "text"
        value = self._take(key, default, expected)
        if value is default and default is not _REQUIRED:
            return value
        if not isinstance(value, str) or (allowed is not None and value not in allowed):
            near = difflib.get_close_matches(str(value), allowed or [], 1)
            raise self._error(key, expected, value, f"is {near[0]!r} meant?" if near else "")
        return value

    def anything(self, key: str, *, default: Any = _REQUIRED) -> Any:
        """A value that is kept but not checked (provenance, notes)."""
        return self._take(key, default, "a value")

    def plain(self, key: str) -> dict[str, Any]:
        """A mapping that is kept but not checked further, {} where it is missing."""
        value = self._take(key, {}, "a mapping of keys to values")
        if not isinstance(value, Mapping):
            raise self._error(key, "a mapping of keys to values", value)
        return dict(value)

    def child(self, key: str, *, default: Any = _REQUIRED) -> Reader:
        value = self._take(key, default, "a mapping of keys to values")
        return Reader(value, source=self.source, path=self._key_path(key), remedy=self.remedy)

    def children(self, key: str, *, default: Any = _REQUIRED) -> list[Reader]:
        value = self._take(key, default, "a list of mappings")
        if not isinstance(value, list | tuple):
            raise self._error(key, "a list of mappings", value)
        path = self._key_path(key)
        return [
            Reader(item, source=self.source, path=f"{path}[{i}]", remedy=self.remedy) for i, item in enumerate(value)
        ]

    def integers(self, key: str, *, length: int, minimum: int = 0) -> tuple[int, ...]:
        expected = f"a list of {length} whole numbers >= {minimum}"
        value = self._take(key, _REQUIRED, expected)
        if (
            not isinstance(value, list | tuple)
            or len(value) != length
            or any(isinstance(v, bool) or not isinstance(v, int) or v < minimum for v in value)
        ):
            raise self._error(key, expected, value)
        return tuple(value)

    def finish(self) -> None:
        """Refuse keys that nobody asked for."""
        unknown = [str(k) for k in self._mapping if k not in self._taken]
        if unknown:
            near = difflib.get_close_matches(unknown[0], sorted(self._taken), 1)
            raise InputError(
                f"unknown key {self._key_path(unknown[0])}",
                where=f"{self.source}: {self._key_path(unknown[0])}",
                expected="keys " + ", ".join(sorted(self._taken)),
                got=", ".join(unknown),
                hint=f"is {near[0]!r} meant?" if near else "remove it",
            )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def read_text(path: Path, kind: str) -> str:
    """The file's text, or an InputError that says which `kind` of file was looked for."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, _siblings(path), 1)
        raise InputError(
            f"{path} does not exist",
            where=str(path),
            expected=f"a {kind} file",
            got="no such file",
            hint=f"is {path.with_name(near[0])} meant?"
            if near
            else "look for it from the folder you are in, or say all of its path",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        got, hint = _why_unreadable(error)
        raise InputError(
            f"{path} cannot be read", where=str(path), expected=f"a {kind} file in UTF-8", got=got, hint=hint
        ) from None


def _why_unreadable(error: OSError | UnicodeDecodeError) -> tuple[str, str]:
    """What is there instead of text, and what to try."""
    if isinstance(error, IsADirectoryError):
        return "a folder", "name a file in it"
    if isinstance(error, UnicodeDecodeError):
        got = f"byte 0x{error.object[error.start]:02x} at {error.start}, which no UTF-8 has there"
        return got, "save it as UTF-8; is it text at all?"
    return error.strerror or str(error), "look at who may read it"


def _siblings(path: Path) -> list[str]:
    try:
        return [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return []


def parse_yaml(text: str, source: str) -> Any:
    """The document in `text`; a syntax error names line and column."""
    try:
        _refuse_depth(text, source)
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{source}: line {mark.line + 1}, column {mark.column + 1}" if mark else source
        raise InputError(
            f"{source} is not valid YAML",
            where=place,
            expected="one YAML document",
            got=str(getattr(error, "problem", None) or error).splitlines()[0],
            hint="look at that line and the one before it; is the file cut short?",
        ) from None
    except (ValueError, RecursionError) as error:  # dates and numbers YAML cannot build, nesting without end
        raise _unparsable(source, "YAML", error) from None


def _refuse_depth(text: str, source: str) -> None:
    """Raise an InputError for nesting that would overflow the stack of libyaml, which composes in C by recursion."""
    if len(text) < _MOST_DEPTH:
        return
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MOST_DEPTH:
            raise InputError(
                f"{source} is not valid YAML", where=source, expected=f"at most {_MOST_DEPTH} levels", got="more"
            )


def _unparsable(source: str, language: str, error: Exception) -> InputError:
    return InputError(
        f"{source} is not valid {language}",
        where=source,
        expected=f"one {language} document",
        got=_shown(str(error)),
        hint="is it the file that was meant, and all of it?",
    )


def load_json(path: Path, kind: str) -> Any:
    """The JSON document at `path`; a syntax error names line and column."""
    try:
        return json.loads(read_text(path, kind))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} is not valid JSON",
            where=f"{path}: line {error.lineno}, column {error.colno}",
            expected="one JSON document",
            got=error.msg,
            hint="look at that line and the one before it; is the file cut short?",
        ) from None
    except (ValueError, RecursionError) as error:
        raise _unparsable(str(path), "JSON", error) from None


def load_document(path: Path, *, schema: str, kind: str) -> Reader:
    """A Reader over the YAML file at `path`, its `schema:` line checked and taken."""
    document = parse_yaml(read_text(path, kind), str(path))
    reader = Reader(document, source=str(path), remedy=_REMEDIES.get(kind, ""))
    found = reader._take("schema", _REQUIRED, schema)
    if found != schema:
        family, _, version = schema.rpartition("/")
        older = str(found).rpartition("/")[0] == family
        raise reader.fail(
            "schema",
            schema,
            found,
            f"this file was written for another version than {version}" if older else f"is this a {kind} file?",
        )
    return reader


def dump_yaml(document: Mapping[str, Any]) -> str:
    """The document as YAML text, keys in the order given, leaf mappings on one line."""
    return yaml.dump(dict(document), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=160)


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the new one, never a half."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def require_writable(path: Path) -> None:
    """Raise, before long work, the InputError that `write_atomically` would after it; makes the folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"{path} cannot be written",
        where=str(path),
        expected="a file in a folder that may be written to, on a disk with room",
        got=str(error),
        hint="name another place",
    )
