"""Workers that serve HTTPS: their certificate out of a Secret, who vouches for it out of a ConfigMap."""

from __future__ import annotations

from pathlib import Path

import httpx
from harness.kube import Object
from harness.sentences import Given, Story, Then, When
from support.installation import Installation
from support.manifests import MODEL, engine, policy, pool, router
from test_router_secured import CERTIFICATES, secret

AUTHORITIES = "llama-ca"


def authorities(certificate: Path) -> Object:
    data = {"ca.crt": certificate.read_text()}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": AUTHORITIES}, "data": data}


def test_workers_are_reached_by_tls_and_must_prove_who_they_are(
    kvfleet: Installation, given: Given, when: When, then: Then, story: Story
) -> None:
    certificate, private = ((CERTIFICATES / name).read_bytes() for name in ("a.crt", "a.key"))
    tls = {
        "certificateSecretRef": "llama-tls",
        "caConfigMapRef": {"name": AUTHORITIES},
        "serverName": "localhost",  # whose the certificate is
    }
    given.applied(
        secret("llama-tls", "kubernetes.io/tls", tls_crt=certificate, tls_key=private),
        authorities(CERTIFICATES / "a.crt"),
        pool(engine={**engine(20), "tls": tls}),
        policy(resilience={"retries": 0}),
        router(),
    )
    then.ready("ModelPool", "llama", within_s=90).ready("FleetRouter", "router", within_s=90)
    url = story.url("router", path="/v1/chat/completions")

    def ask() -> int:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 5}
        return httpx.post(url, json=body, timeout=30).status_code

    then.eventually("a request is answered", lambda: ask() == 200)
    [worker] = story.kube.list("Pod", "kvfleet.io/pool=llama")
    when.applied(authorities(CERTIFICATES / "b.crt")).deleted("Pod", worker["metadata"]["name"])
    then.eventually("a worker that nobody vouches for gets nothing", lambda: ask() == 503, within_s=120)
    when.applied(authorities(CERTIFICATES / "a.crt"))
    then.eventually("it is believed again", lambda: ask() == 200, within_s=120)
