"""Credentials: the pod's service account, and kubeconfigs as people have them."""

from __future__ import annotations

import base64
import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml
from fake_api import CONFIG_MAPS, FakeApi, config_map
from followers import Cluster, in_pool
from scripted import Bench, eventually

from kvfleet_router.io.kubernetes import KubernetesSource
from kvfleet_router.io.kubernetes_access import AccessError, from_kubeconfig, in_cluster


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def kubeconfig(
    folder: Path, server: str, cluster: dict[str, Any] | None = None, user: dict[str, Any] | None = None
) -> Path:
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [
            {"name": "other", "context": {"cluster": "nowhere"}},
            {"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "inference"}},
        ],
        "clusters": [{"name": "c", "cluster": {"server": server, **(cluster or {})}}],
        "users": [{"name": "u", "user": user or {}}],
    }
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(document))
    return path


def test_in_a_cluster_everything_lies_in_the_service_accounts_folder(tmp_path: Path) -> None:
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "ca.crt"))
    (tmp_path / "namespace").write_text("inference")
    (tmp_path / "token").write_text("one\n")
    access = in_cluster({"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443"}, tmp_path)
    assert (access.server, access.namespace) == ("https://[fd00::1]:6443", "inference")
    assert access.headers() == {"authorization": "Bearer one"}
    (tmp_path / "token").write_text("two")
    assert access.headers() == {"authorization": "Bearer two"}
    tls = access.trust()
    assert tls.verify_mode == ssl.CERT_REQUIRED
    assert tls.check_hostname
    assert len(tls.get_ca_certs()) == 1, "nobody else is trusted"


def test_outside_a_cluster_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(AccessError, match="--kubeconfig"):
        in_cluster({}, tmp_path)
    with pytest.raises(AccessError, match="automountServiceAccountToken"):
        in_cluster({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, tmp_path / "none")


async def test_a_kubeconfig_with_a_token(api: FakeApi, bench: Bench, tmp_path: Path) -> None:
    data = {"certificate-authority-data": encoded(api.ca.cert_pem.bytes())}
    file = kubeconfig(tmp_path, f"https://127.0.0.1:{api.port}/", data, {"token": "token-1"})
    api.put(CONFIG_MAPS, config_map(in_pool()))
    access = from_kubeconfig(file)
    assert access.namespace == "inference"
    recorder = await Cluster(api, bench, tmp_path).follow(KubernetesSource(access, "inference/router"))
    await eventually(lambda: recorder.config == in_pool())


async def test_a_kubeconfig_with_files_beside_it(api: FakeApi, bench: Bench, tmp_path: Path) -> None:
    """The token's file is read again for each request, as in a cluster."""
    api.ca.cert_pem.write_to_path(str(tmp_path / "ca.crt"))
    (tmp_path / "token").write_text("old")
    user = {"tokenFile": "token", "client-certificate": "client.crt", "client-key": "client.key"}
    leaf = trustme.CA().issue_cert("router@example.org")
    leaf.cert_chain_pems[0].write_to_path(str(tmp_path / "client.crt"))
    leaf.private_key_pem.write_to_path(str(tmp_path / "client.key"))
    file = kubeconfig(tmp_path, f"https://127.0.0.1:{api.port}", {"certificate-authority": "ca.crt"}, user)
    api.put(CONFIG_MAPS, config_map(in_pool()))
    access = from_kubeconfig(file)
    (tmp_path / "token").write_text("token-1")
    recorder = await Cluster(api, bench, tmp_path).follow(KubernetesSource(access, "inference/router"))
    await eventually(lambda: recorder.config == in_pool())


async def test_a_client_certificate_is_shown(tmp_path: Path) -> None:
    """Its data may be in the kubeconfig itself; it is shown to a server that asks for one."""
    ca = trustme.CA()
    leaf = ca.issue_cert("router@example.org")
    user = {
        "client-certificate-data": encoded(leaf.cert_chain_pems[0].bytes()),
        "client-key-data": encoded(leaf.private_key_pem.bytes()),
    }
    data = {"certificate-authority-data": encoded(ca.cert_pem.bytes())}
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("127.0.0.1").configure_cert(server)
    ca.configure_trust(server)
    server.verify_mode = ssl.CERT_REQUIRED
    client = from_kubeconfig(kubeconfig(tmp_path, "https://127.0.0.1", data, user)).trust()
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = client.wrap_bio(to_client, to_server, server_hostname="127.0.0.1")
    other = server.wrap_bio(to_server, to_client, server_side=True)
    for side in (one, other, one, other):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            pass
    shown = other.getpeercert()
    assert shown is not None
    assert ("email", "router@example.org") in shown["subjectAltName"]


def test_skipping_verification_must_be_asked_for(tmp_path: Path) -> None:
    assert from_kubeconfig(kubeconfig(tmp_path, "https://127.0.0.1")).trust().verify_mode == ssl.CERT_REQUIRED
    careless = {"insecure-skip-tls-verify": True}
    assert from_kubeconfig(kubeconfig(tmp_path, "https://127.0.0.1", careless)).trust().verify_mode == ssl.CERT_NONE


def test_another_context_may_be_chosen(tmp_path: Path) -> None:
    with pytest.raises(AccessError, match="clusters: there is none named 'nowhere'"):
        from_kubeconfig(kubeconfig(tmp_path, "https://127.0.0.1"), "other")
    with pytest.raises(AccessError, match="contexts: there is none named 'missing'"):
        from_kubeconfig(kubeconfig(tmp_path, "https://127.0.0.1"), "missing")


@pytest.mark.parametrize(
    ("cluster", "user", "reason"),
    [
        ({"server": "ftp://x"}, {}, r".*server: .* is no https:// address"),
        ({"server": None}, {}, r".*server: .* is no https:// address"),
        ({"proxy-url": "http://proxy"}, {}, "proxy-url is not supported"),
        ({"certificate-authority": "none.crt"}, {}, "certificates: .*No such file"),
        ({"certificate-authority-data": "%"}, {}, "certificate-authority-data is not base64"),
        ({"certificate-authority-data": encoded(b"no certificate")}, {}, "certificates: "),
        ({}, {"exec": {"command": "aws"}}, r"users\[u\].exec is not supported: .*kubectl create token"),
        ({}, {"client-certificate-data": encoded(b"x"), "client-key-data": encoded(b"y")}, "certificates: "),
    ],
)
def test_what_cannot_be_used_is_named(
    tmp_path: Path, cluster: dict[str, Any], user: dict[str, Any], reason: str
) -> None:
    with pytest.raises(AccessError, match=f"--kubeconfig .*: {reason}"):
        from_kubeconfig(kubeconfig(tmp_path, "https://127.0.0.1", cluster, user))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not YAML"),
        ("[]", "not a kubeconfig"),
        ("{}", "current-context is not set"),
        ("current-context: a\ncontexts: 1", "contexts: there is none named 'a'"),
        ("current-context: a\ncontexts: [1, {name: a, context: 1}]", "contexts: there is none named 'a'"),
    ],
)
def test_a_file_that_is_no_kubeconfig_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "kubeconfig"
    file.write_text(text)
    with pytest.raises(AccessError, match=reason):
        from_kubeconfig(file)
    with pytest.raises(AccessError, match="No such file"):
        from_kubeconfig(tmp_path / "none")
