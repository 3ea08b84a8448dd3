"""A FleetRouter with TLS and API keys out of Secrets, as its pods mount them."""

from __future__ import annotations

import base64
import hashlib
import ssl
from pathlib import Path

import httpx
from harness.sentences import Given, Story, Then, When
from support.installation import Installation
from support.manifests import MODEL, policy, pool, router

CERTIFICATES = Path(__file__).resolve().parents[1] / "tests/router/io/certificates"
KEY, NEXT_KEY = "key-of-alice", "key-of-bob"


def secret(name: str, kind: str, **data: bytes) -> dict[str, object]:
    encoded = {key.replace("_", "."): base64.b64encode(value).decode() for key, value in data.items()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "type": kind, "data": encoded}


def keys(*lines: tuple[str, str]) -> dict[str, object]:
    text = "".join(f"{name}:{hashlib.sha256(key.encode()).hexdigest()}\n" for name, key in lines)
    return secret("router-keys", "Opaque", keys_txt=text.encode())


def secure_url(story: Story, path: str) -> str:
    """As story.url, by TLS up to the router."""
    if story.cluster.reaches_pods:
        return story.url("router", path=path).replace("http://", "https://", 1)
    services = f"{story.cluster.api_proxy()}/api/v1/namespaces/{story.kube.namespace}/services"
    return f"{services}/https:router:80/proxy{path}"


def test_clients_are_served_by_tls_and_asked_for_a_key_that_can_be_exchanged(
    kvfleet: Installation, given: Given, when: When, then: Then, story: Story
) -> None:
    certificate, private = ((CERTIFICATES / name).read_bytes() for name in ("a.crt", "a.key"))
    given.applied(
        secret("router-tls", "kubernetes.io/tls", tls_crt=certificate, tls_key=private),
        keys(("alice", KEY)),
        pool(),
        policy(),
        router(tls={"secretRef": "router-tls"}, auth={"apiKeysSecretRef": {"name": "router-keys", "key": "keys.txt"}}),
    )
    then.ready("ModelPool", "llama", within_s=90).ready("FleetRouter", "router", within_s=90)
    url = secure_url(story, "/v1/chat/completions")
    trusted = ssl.create_default_context(cafile=str(CERTIFICATES / "a.crt"))
    trusted.check_hostname = False  # the certificate is localhost's

    def ask(key: str) -> int:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 5}
        headers = {"x-api-key": key} if key else {}
        return httpx.post(url, json=body, headers=headers, verify=trusted, timeout=30).status_code

    assert [ask(key) for key in ("", NEXT_KEY, KEY)] == [401, 401, 200]
    when.applied(keys(("bob", NEXT_KEY)))
    then.eventually("the new key is taken", lambda: ask(NEXT_KEY) == 200)
    then.eventually("the former one is not", lambda: ask(KEY) == 401)
