"""Manifests from files: YAML in, typed objects out, every problem named.

    read files → YAML documents → objects (`List` kinds unfolded) → the four kinds as pydantic models

Reading goes on after a problem, so one run reports all of them; `ManifestError` carries them as lines
`file:line: Kind namespace/name: field: what is wrong: what to do`. Validation is strict, as the API server's is:
`"3"` is not a number. Objects of other API groups are handed back unread in `others`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from kvfleet_api import API_VERSION, GROUP
from kvfleet_api.acceleratorprofile import AcceleratorProfile
from kvfleet_api.common import Resource
from kvfleet_api.fleetrouter import FleetRouter
from kvfleet_api.modelpool import ModelPool
from kvfleet_api.problems import FieldProblem, did_you_mean, dotted, explain
from kvfleet_api.routingpolicy import RoutingPolicy
from kvfleet_api.yamldoc import MAX_BYTES, Document, FieldPath, YamlError, read_documents

KINDS: Final[dict[str, type[Resource]]] = {
    "ModelPool": ModelPool,
    "RoutingPolicy": RoutingPolicy,
    "FleetRouter": FleetRouter,
    "AcceleratorProfile": AcceleratorProfile,
}
CLUSTER_SCOPED: Final = frozenset({"AcceleratorProfile"})
SUFFIXES: Final = (".yaml", ".yml")
STDIN: Final = "-"
MAX_FILES: Final = 1000

_TOP_LEVEL = ("apiVersion", "kind", "metadata", "spec", "status")
_METADATA = (
    "annotations",
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "finalizers",
    "generateName",
    "generation",
    "labels",
    "managedFields",
    "name",
    "namespace",
    "ownerReferences",
    "resourceVersion",
    "selfLink",
    "uid",
)


@dataclass(frozen=True, slots=True)
class Source:
    """Where an object was written."""

    file: str
    document: int
    """Number of the YAML document in the file, from 1."""
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong in a file. `object` is `Kind namespace/name`, `field` the camelCase path; either may be empty."""

    file: str
    line: int | None
    object: str
    field: str
    message: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return ": ".join(part for part in (where, self.object, self.field, self.message) if part)


class ManifestError(ValueError):
    """Everything that is wrong with the manifests, one line a problem."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


@dataclass(slots=True)
class Manifests:
    """What the files hold."""

    pools: list[ModelPool] = field(default_factory=list)
    policies: list[RoutingPolicy] = field(default_factory=list)
    routers: list[FleetRouter] = field(default_factory=list)
    profiles: list[AcceleratorProfile] = field(default_factory=list)
    others: list[dict[str, Any]] = field(default_factory=list)
    """Objects of other API groups, as written."""
    sources: dict[tuple[str, str], Source] = field(default_factory=dict)
    """(kind, key) → where it was written."""

    def source(self, resource: Resource) -> Source | None:
        return self.sources.get((resource.kind, resource.key))

    def namespaces(self) -> list[str]:
        """The namespaces of everything but cluster-scoped objects, sorted."""
        return sorted({resource.metadata.namespace for resource in self.objects() if resource.metadata.namespace})

    def objects(self) -> Iterator[Resource]:
        yield from self.pools
        yield from self.policies
        yield from self.routers
        yield from self.profiles


def load(paths: Iterable[str | Path], *, namespace: str = "default") -> Manifests:
    """Read files and directories (their *.yaml and *.yml, sub-directories included); `-` is standard input.

    Objects without a namespace get `namespace`. Raises `ManifestError` with all problems found.
    """
    reader = _Reader(namespace)
    for path in paths:
        for name, text in _texts(str(path), reader.problems):
            reader.read(name, text)
    return reader.result()


def parse(text: str | bytes, *, name: str = "<text>", namespace: str = "default") -> Manifests:
    """As `load`, from text in memory."""
    reader = _Reader(namespace)
    reader.read(name, text)
    return reader.result()


@cache
def bundled_profiles() -> tuple[AcceleratorProfile, ...]:
    """The AcceleratorProfiles that come with kvfleet, by name."""
    folder = resources.files("kvfleet_api") / "profiles"
    reader = _Reader("default")
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(SUFFIXES):
            reader.read(f"profiles/{entry.name}", entry.read_bytes())
    return tuple(sorted(reader.result().profiles, key=lambda profile: profile.metadata.name))


def with_bundled(profiles: Iterable[AcceleratorProfile]) -> list[AcceleratorProfile]:
    """`profiles`, and the bundled ones whose name none of them has."""
    own = list(profiles)
    names = {profile.metadata.name for profile in own}
    return own + [profile for profile in bundled_profiles() if profile.metadata.name not in names]


def _texts(path: str, problems: list[Problem]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each file that `path` stands for; what cannot be read goes to `problems`."""
    if path == STDIN:
        yield "<stdin>", sys.stdin.buffer.read(MAX_BYTES + 1)
        return
    root = Path(path)
    if root.is_dir():
        files = sorted(file for file in root.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            problems.append(Problem(path, None, "", "", "no *.yaml or *.yml file in this directory: check the path"))
        if len(files) > MAX_FILES:
            problems.append(Problem(path, None, "", "", f"more than {MAX_FILES} files: pass a narrower directory"))
            return
    elif root.is_file():
        files = [root]
    else:
        problems.append(Problem(path, None, "", "", "no such file or directory: check the path"))
        return
    for file in files:
        try:
            with file.open("rb") as stream:
                yield str(file), stream.read(MAX_BYTES + 1)
        except OSError as error:
            problems.append(Problem(str(file), None, "", "", f"cannot be read: {error.strerror or error}"))


class _Reader:
    """Collects objects and problems over all files."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.found = Manifests()
        self.problems: list[Problem] = []

    def result(self) -> Manifests:
        if self.problems:
            raise ManifestError(self.problems)
        return self.found

    def read(self, name: str, text: str | bytes) -> None:
        first = len(self.problems)
        try:
            for document in read_documents(text):
                self._object(name, document, document.value, ())
        except YamlError as error:
            self.problems.append(Problem(name, error.line, "", "", error.message))
        self.problems[first:] = sorted(self.problems[first:], key=lambda problem: problem.line or 0)

    def _object(self, file: str, document: Document, value: Any, path: FieldPath) -> None:
        """Read one object, or the items of a `List`. `path` leads to it inside the document."""

        def problem(message: str, field: FieldPath = (), label: str = "") -> None:
            self.problems.append(Problem(file, document.line_of([*path, *field]), label, dotted(field), message))

        if (
            not isinstance(value, dict)
            or not isinstance(value.get("apiVersion"), str)
            or not isinstance(value.get("kind"), str)
        ):
            problem("not a Kubernetes object: it needs apiVersion and kind (strings)")
            return
        api_version, kind = value["apiVersion"], value["kind"]
        if kind.endswith("List") and isinstance(value.get("items"), list):
            for index, item in enumerate(value["items"]):
                self._object(file, document, item, [*path, "items", index])
            return
        if api_version.partition("/")[0] != GROUP:
            self.found.others.append(value)
            return
        if api_version != API_VERSION:
            problem(f"{api_version!r} is not served: write {API_VERSION}", ["apiVersion"], kind)
            return
        model = KINDS.get(kind)
        if model is None:
            problem(f"unknown kind {kind!r}{did_you_mean(kind, KINDS)}: one of {', '.join(KINDS)}", ["kind"])
            return
        label = f"{kind} {_key(value, kind, self.namespace)}"
        resource, field_problems = _validated(model, value, self.namespace)
        for found in field_problems:
            problem(found.message, found.path, label)
        if resource is not None:
            self._add(resource, Source(file, document.index, document.line_of(path)), label)

    def _add(self, resource: Resource, source: Source, label: str) -> None:
        first = self.found.sources.setdefault((resource.kind, resource.key), source)
        if first is not source:
            message = f"already defined at {first}: remove one or rename it"
            self.problems.append(Problem(source.file, source.line, label, "metadata.name", message))
            return
        match resource:
            case ModelPool():
                self.found.pools.append(resource)
            case RoutingPolicy():
                self.found.policies.append(resource)
            case FleetRouter():
                self.found.routers.append(resource)
            case AcceleratorProfile():
                self.found.profiles.append(resource)


def _key(value: dict[str, Any], kind: str, namespace: str) -> str:
    metadata = value.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    name = metadata.get("name")
    name = name if isinstance(name, str) and name else "(unnamed)"
    return name if kind in CLUSTER_SCOPED else f"{metadata.get('namespace') or namespace}/{name}"


_FREE_FORM = frozenset({"podTemplate", "resources"})


def _without_nulls(value: Any) -> Any:
    """`value` without keys that hold null, which mean absent to the API server; free-form fields stay as they are."""
    if isinstance(value, dict):
        kept = {key: part for key, part in value.items() if part is not None}
        return {key: part if key in _FREE_FORM else _without_nulls(part) for key, part in kept.items()}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _validated(
    model: type[Resource], value: dict[str, Any], namespace: str
) -> tuple[Resource | None, list[FieldProblem]]:
    """The object as `model`, or what is wrong with it. A `status` in a file means nothing and is left out."""
    problems = [
        FieldProblem((key,), f"unknown field{did_you_mean(str(key), _TOP_LEVEL)}: rename or remove it")
        for key in value
        if key not in _TOP_LEVEL
    ]
    body = {key: part for key, part in value.items() if key != "status" and key in _TOP_LEVEL}
    body = _without_nulls(body)
    metadata = body.get("metadata")
    if isinstance(metadata, dict):
        problems += [
            FieldProblem(("metadata", key), f"unknown field{did_you_mean(str(key), _METADATA)}: rename or remove it")
            for key in metadata
            if key not in _METADATA
        ]
        body["metadata"] = metadata = dict(metadata)
        if model.__name__ not in CLUSTER_SCOPED:
            metadata["namespace"] = metadata.get("namespace") or namespace
        elif metadata.get("namespace"):
            problems.append(FieldProblem(("metadata", "namespace"), f"{model.__name__} is cluster-scoped: remove it"))
    try:
        # Through JSON, because strict validation of JSON is what the API server does.
        text = json.dumps(body, allow_nan=False)
    except (TypeError, ValueError) as error:
        return None, [*problems, FieldProblem((), f"holds a value JSON cannot express: {error}")]
    try:
        resource = model.model_validate_json(text, strict=True, by_alias=True, by_name=False)
    except ValidationError as error:
        return None, problems + explain(model, error)
    return (None if problems else resource), problems
