"""YAML text → documents with line numbers, safe against hostile input.

PyYAML's safe loader reads the text; this module adds what a file from outside needs:

- bounds: bytes, documents, nesting depth, and nodes **after** aliases are expanded (a "billion laughs" file is small
  before and enormous after). Aliases and merge keys work; an alias that contains itself is refused.
- repeated keys are errors (YAML silently keeps the last one).
- scalars as kubectl reads them: timestamps and `1:30` stay strings.
- `line_of`: the line of any field, so that an error can point at it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import yaml

MAX_BYTES: Final = 4 * 1024 * 1024
MAX_DOCUMENTS: Final = 2000
MAX_DEPTH: Final = 64
MAX_NODES: Final = 200_000

FieldPath = Sequence[str | int]
"""The way to a field: keys and list indexes from the document's root."""


class YamlError(ValueError):
    """Text that is not acceptable YAML: what is wrong, and the line where known (from 1)."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.line = line


@dataclass(frozen=True, slots=True)
class Document:
    """One YAML document: its value, its number in the file (from 1), and its nodes for `line_of`."""

    value: Any
    index: int
    node: yaml.Node

    def line_of(self, path: FieldPath) -> int:
        """The line (from 1) of the field at `path`, or of its closest parent that exists."""
        node, line = self.node, _line(self.node)
        for part in path:
            child = _child(node, part)
            if child is None:
                break
            line, node = child
        return line


class _Loader(yaml.SafeLoader):
    """The safe loader with a depth limit, and with scalars resolved as kubectl does."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("timestamp", "int")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise YamlError(f"nested more than {MAX_DEPTH} levels deep: flatten it", _line(parent) if parent else None)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^(?:[-+]?0b[01_]+|[-+]?0[0-7_]+|[-+]?(?:0|[1-9][0-9_]*)|[-+]?0x[0-9a-fA-F_]+)$"),
    list("-+0123456789"),
)


def read_documents(text: bytes | str) -> Iterator[Document]:
    """The documents of `text` that are not empty, in order. Raises `YamlError` at the first that cannot be read."""
    if len(text) > MAX_BYTES:
        raise YamlError(f"larger than {MAX_BYTES // 1024**2} MiB: split the file")
    try:
        loader = _Loader(text)
        index = 0
        while loader.check_node():
            index += 1
            if index > MAX_DOCUMENTS:
                raise YamlError(f"more than {MAX_DOCUMENTS} documents: split the file")
            node = loader.get_node()
            if node is None:
                break
            _check_nodes(node, {}, set())
            value = loader.construct_document(node)
            if value is not None:
                yield Document(value, index, node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context or "cannot be parsed"
        raise YamlError(f"not valid YAML: {problem}", mark.line + 1 if mark else None) from error
    except yaml.reader.ReaderError as error:
        raise YamlError(f"not valid YAML: {error.reason} at byte {error.position}: save the file as UTF-8") from error
    except UnicodeDecodeError as error:
        raise YamlError(f"not valid UTF-8 at byte {error.start}: save the file as UTF-8") from error
    except yaml.YAMLError as error:
        raise YamlError(f"not valid YAML: {error}") from error
    except (ValueError, OverflowError) as error:
        if isinstance(error, YamlError):
            raise
        raise YamlError(f"a value cannot be read: {error}") from error


def _check_nodes(node: yaml.Node, sizes: dict[int, int], open_nodes: set[int]) -> int:
    """Size of the tree below `node` with every alias expanded; each distinct node is walked once."""
    known = sizes.get(id(node))
    if known is not None:
        return known
    if id(node) in open_nodes:
        raise YamlError("an alias refers to something that contains it: write the value out", _line(node))
    open_nodes.add(id(node))
    size = 1
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        size += sum(
            _check_nodes(key, sizes, open_nodes) + _check_nodes(value, sizes, open_nodes) for key, value in node.value
        )
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_check_nodes(item, sizes, open_nodes) for item in node.value)
    if size > MAX_NODES:
        raise YamlError(f"more than {MAX_NODES} values once aliases are expanded: split the file", _line(node))
    open_nodes.discard(id(node))
    sizes[id(node)] = size
    return size


def _check_keys(node: yaml.MappingNode) -> None:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise YamlError("a key must be a plain string", _line(key))
        if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
            raise YamlError(f"key {key.value!r} is repeated (first on line {seen[key.value]}): keep one", _line(key))
        seen[key.value] = _line(key)


def _child(node: yaml.Node, part: str | int) -> tuple[int, yaml.Node] | None:
    if isinstance(node, yaml.MappingNode):
        # The last match: a merge key puts the merged pairs in front of the mapping's own.
        for key, value in reversed(node.value):
            if key.value == part:
                return _line(key), value
    elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and 0 <= part < len(node.value):
        return _line(node.value[part]), node.value[part]
    return None


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1 if node.start_mark else 1
