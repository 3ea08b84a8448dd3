"""Reads PromQL as far as tests need it: which metrics an expression names."""

from __future__ import annotations

import re

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_IGNORED = re.compile(
    r"""
    \{[^{}]*\}                                                            # label matchers
    | \[[^\]]*\]                                                          # ranges
    | \b(?:by|without|on|ignoring|group_left|group_right)\s*\([^()]*\)    # lists of labels
    | \boffset\s+\w+
    """,
    re.VERBOSE,
)
_NAME = re.compile(r"(?<![\w.:])[a-zA-Z_:][\w:]*(?![\w:])(?!\s*\()")
_WORDS = frozenset({"and", "or", "unless", "bool", "sum", "min", "max", "avg", "group", "count", "inf", "nan"})
"""Aggregations stand alone where `by (…)` follows them."""


def metrics_of(expression: str) -> set[str]:
    """The names of all metrics in a PromQL expression."""
    bare = _IGNORED.sub(" ", _STRING.sub('""', expression))
    return {name for name in _NAME.findall(bare) if name.lower() not in _WORDS}
