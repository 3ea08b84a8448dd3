"""Applies the manifests of a folder to the API server of this pod's cluster: `apply_objects.py FOLDER`.

The chart's hook: it brings the chart's own custom resources after the CRDs of the same release, and runs inside the
image. An API server needs a moment until it serves a new kind or knows a new role, so what it refuses for that is tried
again until TIMEOUT_S; what it finds wrong with a manifest is an error at once.
"""

import os
import sys
import time
from pathlib import Path

import httpx
import yaml

ACCOUNT = Path(os.environ.get("ACCOUNT", "/var/run/secrets/kubernetes.io/serviceaccount"))
HOST, PORT = os.environ.get("KUBERNETES_SERVICE_HOST", ""), os.environ.get("KUBERNETES_SERVICE_PORT", "")
SERVER = os.environ.get("SERVER") or f"https://{f'[{HOST}]' if ':' in HOST else HOST}:{PORT}"
TIMEOUT_S = float(os.environ.get("TIMEOUT_S", "120"))
PERIOD_S = float(os.environ.get("PERIOD_S", "0.5"))
FIELD_MANAGER = "kvfleet-chart"
FOR_A_WHILE = {401, 403, 404, 429, 500, 502, 503, 504}


class NotYetError(Exception):
    """The API server may accept it later."""


def call(client, method, path, **more):
    """The answer's JSON; NotYetError or SystemExit where it is a refusal."""
    try:
        answer = client.request(method, path, **more)
    except httpx.TransportError as error:
        raise NotYetError(f"{SERVER}{path}: {error}") from None
    if answer.is_success:
        return answer.json()
    problem = f"{method} {path}: {answer.status_code} {answer.text[:2000]}"
    if answer.status_code in FOR_A_WHILE:
        raise NotYetError(problem)
    sys.exit(problem)


def apply(client, manifest):
    """Server-side apply of one object."""
    api, kind, metadata = f"/apis/{manifest['apiVersion']}", manifest["kind"], manifest["metadata"]
    for resource in call(client, "GET", api)["resources"]:
        if resource["kind"] == kind and "/" not in resource["name"]:
            scope = f"/namespaces/{metadata['namespace']}" if resource["namespaced"] else ""
            path = f"{api}{scope}/{resource['name']}/{metadata['name']}"
            head = {"Content-Type": "application/apply-patch+yaml"}
            question = {"fieldManager": FIELD_MANAGER, "force": "true"}
            call(client, "PATCH", path, params=question, headers=head, content=yaml.safe_dump(manifest))
            return
    raise NotYetError(f"{api} does not have {kind}: install the CRDs (crds.enabled=true, or crds/ of the repository)")


def main():
    deadline = time.monotonic() + TIMEOUT_S
    files = sorted(Path(sys.argv[1]).glob("*.yaml"))
    headers = {"Authorization": f"Bearer {(ACCOUNT / 'token').read_text().strip()}"}
    authority = str(ACCOUNT / "ca.crt") if SERVER.startswith("https:") else False
    with httpx.Client(base_url=SERVER, headers=headers, verify=authority, timeout=10) as client:
        for file in files:
            while True:
                try:
                    apply(client, yaml.safe_load(file.read_text()))
                    break
                except NotYetError as error:
                    if time.monotonic() > deadline:
                        sys.exit(f"{file.name}: gave up after {TIMEOUT_S:.0f} s: {error}")
                    time.sleep(PERIOD_S)
            sys.stdout.write(f"applied {file.stem}\n")


if __name__ == "__main__":
    main()
