"""A pod's volumes: folders on the machine that are mounted into its containers.

ConfigMap, Secret, downward API and projected volumes are written as a kubelet writes them: the files are links into
`..data`, itself a link to a folder with a time in its name, so that one rename changes all files at once and a reader
sees either the old or the new contents. A mount with `subPath` binds one file and never changes, as on a real node.
"""

from __future__ import annotations

import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path

from harness.kubelet.api import Api, Object
from harness.kubelet.env import ConfigSource, PodFacts, config_data, field_value
from harness.kubelet.images import expand
from harness.kubelet.store import MissingReferenceError

PROJECTED_KINDS = ("configMap", "secret", "downwardAPI", "projected")
SUPPORTED_KINDS = (*PROJECTED_KINDS, "emptyDir")
DEFAULT_MODE = 0o644


@dataclass(frozen=True)
class File:
    content: bytes
    mode: int


@dataclass(frozen=True)
class Mount:
    source: Path
    target: str
    read_only: bool


Tokens = dict[tuple[str, str], str]
"""Service account tokens by (volume name, path)."""


def project(volume: Object, pod: Object, source: ConfigSource, facts: PodFacts, tokens: Tokens) -> dict[str, File]:
    """The files of a volume, by path. Raises MissingReferenceError where a source that is not optional is missing."""
    if "projected" not in volume:
        kind = next(kind for kind in PROJECTED_KINDS if kind in volume)
        return _project_one(kind, volume[kind], volume[kind].get("defaultMode", DEFAULT_MODE), pod, source, facts)
    projected = volume["projected"]
    mode = projected.get("defaultMode", DEFAULT_MODE)
    files: dict[str, File] = {}
    for part in projected.get("sources") or []:
        if "serviceAccountToken" in part:
            path = part["serviceAccountToken"]["path"]
            files[path] = File(tokens[volume["name"], path].encode(), mode)
        else:
            kind = next(kind for kind in ("configMap", "secret", "downwardAPI") if kind in part)
            files |= _project_one(kind, part[kind], mode, pod, source, facts)
    return files


def _project_one(
    kind: str, spec: Object, mode: int, pod: Object, source: ConfigSource, facts: PodFacts
) -> dict[str, File]:
    if kind == "downwardAPI":
        return {
            item["path"]: File(field_value(pod, item["fieldRef"]["fieldPath"], facts).encode(), item.get("mode", mode))
            for item in spec.get("items") or []
        }
    name = spec.get("name") or spec.get("secretName", "")
    look_up = source.config_map if kind == "configMap" else source.secret
    try:
        data = config_data(look_up(pod["metadata"]["namespace"], name))
    except MissingReferenceError:
        if spec.get("optional"):
            return {}
        raise
    if not spec.get("items"):
        return {key: File(value, mode) for key, value in data.items()}
    missing = [item["key"] for item in spec["items"] if item["key"] not in data]
    if missing and not spec.get("optional"):
        raise MissingReferenceError(f'{kind} "{name}" has no key "{missing[0]}"')
    return {
        item["path"]: File(data[item["key"]], item.get("mode", mode)) for item in spec["items"] if item["key"] in data
    }


_generation = itertools.count()


def write_atomically(folder: Path, files: dict[str, File]) -> bool:
    """Makes the folder show exactly these files, all at once; False where it did already."""
    if _read(folder) == files:
        return False
    fresh = folder / f"..{next(_generation)}"
    fresh.mkdir(parents=True)
    for name, file in files.items():
        path = fresh / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.content)
        path.chmod(file.mode)
    data = folder / "..data"
    stale = data.resolve() if data.is_symlink() else None
    (folder / "..data_new").symlink_to(fresh.name)
    (folder / "..data_new").rename(data)
    heads = {Path(name).parts[0] for name in files}
    for head in heads:
        if not (folder / head).is_symlink():
            (folder / head).symlink_to(f"..data/{head}")
    for entry in folder.iterdir():
        if not entry.name.startswith("..") and entry.name not in heads:
            entry.unlink()
    if stale is not None:
        shutil.rmtree(stale)
    return True


def _read(folder: Path) -> dict[str, File] | None:
    data = folder / "..data"
    if not data.is_symlink():
        return None
    paths = [path for path in data.resolve().rglob("*") if path.is_file()]
    return {
        str(path.relative_to(data.resolve())): File(path.read_bytes(), path.stat().st_mode & 0o7777) for path in paths
    }


class PodVolumes:
    """The volumes of one pod, under one folder."""

    def __init__(self, folder: Path, pod: Object, api: Api, source: ConfigSource, facts: PodFacts) -> None:
        self._folder = folder
        self._pod = pod
        self._api = api
        self._source = source
        self._facts = facts
        self._tokens: Tokens = {}
        self._volumes: list[Object] = pod["spec"].get("volumes") or []

    async def prepare(self) -> None:
        """Raises MissingReferenceError as long as something that is mounted does not exist."""
        for volume in self._volumes:
            if "emptyDir" in volume:
                folder = self._folder / volume["name"]
                folder.mkdir(parents=True, exist_ok=True)
                folder.chmod(0o777)
            else:
                await self._request_tokens(volume)
                self._write(volume)

    def refresh(self) -> None:
        """Writes anew what changed. Where a source is gone, the old files stay, as on a real node."""
        for volume in self._volumes:
            if "emptyDir" not in volume:
                try:
                    self._write(volume)
                except MissingReferenceError:
                    continue

    def mounts(self, container: Object, environment: dict[str, str]) -> list[Mount]:
        mounts = []
        for mount in container.get("volumeMounts") or []:
            source = self._folder / mount["name"]
            part = mount.get("subPath") or expand(mount.get("subPathExpr", ""), environment)
            if part:
                source = (source / part).resolve() if (source / part).exists() else source / part
                if not source.is_relative_to(self._folder):
                    raise MissingReferenceError(f"subPath {part} leads out of volume {mount['name']}")
                if not source.exists():
                    source.mkdir(parents=True)
            projected = next(volume for volume in self._volumes if volume["name"] == mount["name"])
            read_only = bool(mount.get("readOnly")) or "emptyDir" not in projected
            mounts.append(Mount(source, mount["mountPath"], read_only))
        return mounts

    def _write(self, volume: Object) -> None:
        files = project(volume, self._pod, self._source, self._facts, self._tokens)
        write_atomically(self._folder / volume["name"], files)

    async def _request_tokens(self, volume: Object) -> None:
        metadata, account = self._pod["metadata"], self._pod["spec"]["serviceAccountName"]
        for part in volume.get("projected", {}).get("sources") or []:
            if "serviceAccountToken" not in part:
                continue
            wanted = part["serviceAccountToken"]
            body = {
                "spec": {
                    "audiences": [wanted["audience"]] if wanted.get("audience") else [],
                    "expirationSeconds": wanted.get("expirationSeconds", 3600),
                    "boundObjectRef": {
                        "apiVersion": "v1",
                        "kind": "Pod",
                        "name": metadata["name"],
                        "uid": metadata["uid"],
                    },
                }
            }
            path = f"/api/v1/namespaces/{metadata['namespace']}/serviceaccounts/{account}/token"
            answer = await self._api.create(path, body)
            self._tokens[volume["name"], wanted["path"]] = answer["status"]["token"]
