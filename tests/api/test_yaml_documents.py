"""YAML from outside: bounded, unambiguous, read as kubectl reads it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfleet_api import yamldoc
from kvfleet_api.yamldoc import YamlError, read_documents


def read(text: str | bytes) -> list[object]:
    return [document.value for document in read_documents(text)]


def failure(text: str | bytes) -> tuple[str, int | None]:
    with pytest.raises(YamlError) as caught:
        read(text)
    return caught.value.message, caught.value.line


def test_documents_are_numbered_and_empty_ones_left_out() -> None:
    documents = list(read_documents("---\na: 1\n---\n---\nb: 2\n"))
    assert [(document.index, document.value) for document in documents] == [(1, {"a": 1}), (3, {"b": 2})]


def test_lines_of_fields() -> None:
    (document,) = read_documents("a:\n  b:\n  - c: 1\n  - c: 2\n    d: 3\n")
    assert document.line_of(["a", "b", 1, "d"]) == 5
    assert document.line_of(["a", "b", 1, "absent", "deeper"]) == 4
    assert document.line_of(["a", "b", 7]) == 2
    assert document.line_of([]) == 1


def test_scalars_are_what_kubectl_makes_of_them() -> None:
    text = "[2024-01-02, 2024-01-02T03:04:05Z, 8:30, 0o17, 010, 0x10, 1_000, yes, 'yes', 1.5, ~]"
    assert read(text) == [["2024-01-02", "2024-01-02T03:04:05Z", "8:30", "0o17", 8, 16, 1000, True, "yes", 1.5, None]]


def test_aliases_and_merge_keys_work() -> None:
    assert read("base: &b {x: 1, y: 2}\nown: {<<: *b, y: 3}\nsame: *b\n") == [
        {"base": {"x": 1, "y": 2}, "own": {"x": 1, "y": 3}, "same": {"x": 1, "y": 2}}
    ]
    (document,) = read_documents("base: &b {x: 1,\n  y: 2}\nown:\n  <<: *b\n  y: 3\n")
    assert document.line_of(["own", "y"]) == 5


def test_alias_bombs_are_refused_before_they_are_built() -> None:
    levels = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 12)]
    message, line = failure("l0: &l0 [x]\n" + "\n".join(levels))
    assert message == f"more than {yamldoc.MAX_NODES} values once aliases are expanded: split the file"
    assert line == 6
    merges = [f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 10)}]}}" for n in range(1, 12)]
    assert "once aliases are expanded" in failure("m0: &m0 {x: 1}\n" + "\n".join(merges))[0]


def test_an_alias_inside_itself_is_refused() -> None:
    assert failure("a: &a\n  b: *a\n") == ("an alias refers to something that contains it: write the value out", 1)


@pytest.mark.parametrize("text", ["[" * 10_000, "{a: " * 10_000, "- " * 10_000, "a: " + "[" * 65 + "]" * 65])
def test_deep_nesting_is_refused(text: str) -> None:
    assert failure(text)[0] == f"nested more than {yamldoc.MAX_DEPTH} levels deep: flatten it"


def test_size_and_number_of_documents_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yamldoc, "MAX_BYTES", 1024 * 1024)
    monkeypatch.setattr(yamldoc, "MAX_DOCUMENTS", 3)
    assert failure(b"#" * (1024 * 1024 + 1)) == ("larger than 1 MiB: split the file", None)
    assert failure("a: 1\n---\n" * 4) == ("more than 3 documents: split the file", None)


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("a: 1\nb: 2\na: 3\n", "key 'a' is repeated (first on line 1): keep one", 3),
        ("? [a]\n: 1\n", "a key must be a plain string", 1),
        ("a: !!python/object:os.system {}\n", "not valid YAML: could not determine a constructor", 1),
        ("a: b: c\n", "not valid YAML: mapping values are not allowed here", 1),
        (b"a: \xff\n", "not valid YAML: invalid start byte at byte 3: save the file as UTF-8", None),
        ("a: \x00\n", "not valid YAML: special characters are not allowed at byte 3: save the file as UTF-8", None),
        ("a: !!int x\n", "a value cannot be read: invalid literal for int()", None),
        ("a: *b\n", "not valid YAML: found undefined alias 'b'", 1),
        ("%YAML 9.9\n---\na: 1\n", "not valid YAML: found incompatible YAML document (version 1.* is required)", 1),
    ],
)
def test_unacceptable_text_says_what_and_where(text: str | bytes, message: str, line: int | None) -> None:
    found, at = failure(text)
    assert found.startswith(message)
    assert at == line


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.one_of(st.binary(max_size=200), st.text(alphabet="ab:-[]{}&*<!|>'\"#%?\n ~,0", max_size=80)))
def test_any_bytes_are_read_or_refused(text: str | bytes) -> None:
    try:
        read(text)
    except YamlError as error:
        assert error.message
