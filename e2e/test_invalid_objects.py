"""What is wrong is refused by the API server itself, with the field's name; it and the models never disagree."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from harness.kube import Kube
from harness.settings import E2E_DIR
from hypothesis import HealthCheck, Phase, given, settings
from kubernetes.dynamic.exceptions import BadRequestError, UnprocessibleEntityError
from pydantic import ValidationError
from support.installation import Installation

from kvfleet_api import API_VERSION
from kvfleet_api.manifests import KINDS

API_TESTS = E2E_DIR.parent / "tests/api"
sys.path.insert(0, str(API_TESTS))

from generated_specs import has_null, specs  # noqa: E402 - beside the tests that it is for

EXAMPLES_PER_KIND = 120


def refusal(kube: Kube, document: dict[str, Any]) -> str:
    """Why the API server would not create the object; empty if it would. Nothing is created."""
    try:
        kube.create_dry(document)
    except UnprocessibleEntityError as error:
        return "\n".join(cause["field"] + ": " + cause["message"] for cause in _causes(error.body)) or str(error.body)
    except BadRequestError as error:  # an unknown field
        return str(json.loads(error.body)["message"])
    return ""


def _causes(body: Any) -> list[dict[str, str]]:
    causes: list[dict[str, str]] = json.loads(body).get("details", {}).get("causes", [])
    return causes


@pytest.mark.parametrize(
    "document",
    [document for document in yaml.safe_load_all((API_TESTS / "corpus/invalid.yaml").read_text()) if document],
    ids=lambda document: document["metadata"]["name"],
)
def test_an_invalid_object_is_refused_by_name_of_its_field(
    kvfleet: Installation, kube: Kube, document: dict[str, Any]
) -> None:
    annotations = document["metadata"]["annotations"]
    why = refusal(kube, document)
    assert why, "the API server took it"
    if rule := annotations.get("kvfleet.io/rule"):
        assert rule in why
    last = annotations["kvfleet.io/field"].rpartition(".")[2].partition("[")[0]
    assert last in why or annotations.get("kvfleet.io/rule"), why


def test_every_valid_object_of_the_corpus_is_taken(kvfleet: Installation, kube: Kube) -> None:
    documents = [d for d in yaml.safe_load_all((API_TESTS / "corpus/valid.yaml").read_text()) if d]
    for document in documents:  # whatever namespace it was written for
        document["metadata"].pop("namespace", None)
    refused = {document["metadata"]["name"]: why for document in documents if (why := refusal(kube, document))}
    assert documents
    assert refused == {}


@pytest.mark.parametrize("kind", KINDS)
def test_the_models_and_the_api_server_agree_on_any_spec(
    kvfleet: Installation, kube: Kube, kind: str, tells: Callable[[str], None]
) -> None:
    taken: list[bool] = []

    @settings(
        max_examples=EXAMPLES_PER_KIND,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(specs(kind))
    def agree(spec: dict[str, Any]) -> None:
        if has_null(spec):  # the API server drops null where it means absent
            return
        body = {"apiVersion": API_VERSION, "kind": kind, "metadata": {"name": "generated"}, "spec": spec}
        try:
            KINDS[kind].model_validate_json(json.dumps(body), strict=True)
            model_says = ""
        except ValidationError as error:
            model_says = str(error)
        server_says = refusal(kube, body)
        assert bool(model_says) == bool(server_says), f"model: {model_says!r}; API server: {server_says!r}; {spec}"
        taken.append(not server_says)

    agree()
    assert set(taken) == {True, False}
    tells(f"{len(taken)} generated {kind} specs, {sum(taken)} of them valid: no disagreement")
