"""Is a live object as wanted? Compares what we state and leaves alone what others added.

`difference` finds the first field of the wanted object that the live one has otherwise: extra keys in mappings and
extra items in lists that Kubernetes merges by name are others' business; other lists, and selectors, must be equal.
A field wanted empty equals an absent one, and `1` equals `1000m` where a quantity is meant, as the API server stores them so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, Final

from kvfleet_operator.reconcile.names import HASH
from kvfleet_operator.reconcile.podtemplate import MERGE_KEYS

ITEM_KEYS: Final[Mapping[str, str]] = {**MERGE_KEYS, "ownerReferences": "uid"}
EXACT: Final = frozenset({"selector", "nodeSelector", "matchLabels"})
"""Mappings that are one value: an extra key changes their meaning."""
QUANTITIES: Final = frozenset({"limits", "requests", "sizeLimit", "divisor"})
SUFFIXES: Final[Mapping[str, Decimal]] = {
    **{suffix: Decimal(1000) ** power for power, suffix in enumerate(["n", "u", "m", "", "k", "M", "G", "T", "P", "E"], -3)},
    **{suffix: Decimal(1024) ** power for power, suffix in enumerate(["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"], 1)},
}  # fmt: skip


def difference(wanted: Mapping[str, Any], live: Mapping[str, Any]) -> str | None:
    """The path of the first field that must be written, or None where nothing is to be done."""
    annotations = live["metadata"].get("annotations") or {}
    if annotations.get(HASH) != wanted["metadata"]["annotations"][HASH]:
        return f"metadata.annotations.{HASH}"
    metadata = {key: value for key, value in wanted["metadata"].items() if key != "resourceVersion"}
    return _differs({**wanted, "metadata": metadata}, live, "", "")


def _differs(wanted: Any, live: Any, key: str, path: str) -> str | None:
    if live is None:
        return None if wanted in (None, "", [], {}, False) else path
    if isinstance(wanted, Mapping) and isinstance(live, Mapping):
        if key in EXACT and live.keys() - wanted.keys():
            return path
        return _first(
            _differs(
                value, live.get(name), key if key in QUANTITIES else name, f"{path}.{name}" if path else name
            )
            for name, value in wanted.items()
        )  # fmt: skip
    if isinstance(wanted, list) and isinstance(live, list):
        return _list_differs(wanted, live, key, path)
    if key in QUANTITIES:
        left, right = _quantity(wanted), _quantity(live)
        return None if left is not None and left == right else path
    return None if wanted == live else path


def _list_differs(wanted: Sequence[Any], live: Sequence[Any], key: str, path: str) -> str | None:
    by = ITEM_KEYS.get(key, "")
    if by and all(isinstance(item, Mapping) and by in item for item in wanted):
        found = {item.get(by): item for item in live if isinstance(item, Mapping)}
        return _first(_differs(item, found.get(item[by]), "", f"{path}[{item[by]}]") for item in wanted)
    if len(wanted) != len(live):
        return path
    pairs = enumerate(zip(wanted, live, strict=True))
    return _first(_differs(ours, theirs, "", f"{path}[{index}]") for index, (ours, theirs) in pairs)


def _first(paths: Any) -> str | None:
    return next((path for path in paths if path is not None), None)


def _quantity(value: Any) -> Decimal | None:
    text = str(value).strip()
    digits = text.rstrip("numkMGTPEi")
    if digits and text[len(digits) :] not in SUFFIXES:
        digits, exponent = text, Decimal(1)  # 1E3: a plain number with an exponent
    else:
        exponent = SUFFIXES[text[len(digits) :]]
    try:
        return Decimal(digits) * exponent
    except InvalidOperation:
        return None


def others_scale(live: Mapping[str, Any], manager: str) -> bool:
    """Whether a field manager other than `manager` owns the workload's `spec.replicas`."""
    for entry in live["metadata"].get("managedFields") or []:
        spec = (entry.get("fieldsV1") or {}).get("f:spec") or {}
        if entry.get("manager") != manager and "f:replicas" in spec:
            return True
    return False
