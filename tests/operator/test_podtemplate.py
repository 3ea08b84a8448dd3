"""A user's partial pod template over the generated one."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfleet_operator.reconcile.podtemplate import TemplateError, merge, merge_pod

BASE = {
    "metadata": {"labels": {"app": "x"}},
    "spec": {
        "containers": [
            {
                "name": "engine",
                "args": ["--a", "1"],
                "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
                "ports": [{"name": "http", "containerPort": 8000}],
                "readinessProbe": {"httpGet": {"path": "/health"}, "periodSeconds": 5},
                "volumeMounts": [{"name": "cache", "mountPath": "/cache"}],
            }
        ],
        "volumes": [{"name": "cache", "emptyDir": {}}],
        "tolerations": [{"key": "gpu"}],
    },
}


def container(patch):
    return merge(BASE, {"spec": {"containers": [{"name": "engine", **patch}]}})["spec"]["containers"][0]


def test_containers_merge_by_name_and_new_ones_come_last():
    merged = merge(
        BASE, {"spec": {"containers": [{"name": "sidecar", "image": "s"}, {"name": "engine", "image": "e"}]}}
    )
    first, second = merged["spec"]["containers"]
    assert (first["name"], first["image"], first["args"]) == ("engine", "e", ["--a", "1"])
    assert second == {"name": "sidecar", "image": "s"}


def test_lists_without_a_merge_key_are_replaced():
    assert container({"args": ["--b"]})["args"] == ["--b"]
    assert merge(BASE, {"spec": {"tolerations": []}})["spec"]["tolerations"] == []


def test_an_environment_variable_is_replaced_whole_and_keeps_its_place():
    env = container({"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]})["env"]
    assert env[0] == {"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}
    assert env[1] == {"name": "B", "value": "2"}


def test_a_volume_changes_its_source_instead_of_having_two():
    merged = merge(BASE, {"spec": {"volumes": [{"name": "cache", "persistentVolumeClaim": {"claimName": "c"}}]}})
    assert merged["spec"]["volumes"] == [{"name": "cache", "persistentVolumeClaim": {"claimName": "c"}}]


def test_another_probe_handler_replaces_the_generated_one():
    probe = container({"readinessProbe": {"exec": {"command": ["true"]}}})["readinessProbe"]
    assert probe == {"exec": {"command": ["true"]}, "periodSeconds": 5}
    tuned = container({"readinessProbe": {"periodSeconds": 1}})["readinessProbe"]
    assert tuned == {"httpGet": {"path": "/health"}, "periodSeconds": 1}


def test_null_deletes_a_key_and_the_directive_an_item():
    assert "readinessProbe" not in container({"readinessProbe": None})
    assert container({"env": [{"name": "A", "$patch": "delete"}]})["env"] == [{"name": "B", "value": "2"}]


def test_ports_and_mounts_merge_by_their_keys():
    merged = container(
        {"ports": [{"containerPort": 8000, "hostPort": 1}], "volumeMounts": [{"name": "x", "mountPath": "/cache"}]}
    )
    assert merged["ports"] == [{"name": "http", "containerPort": 8000, "hostPort": 1}]
    assert merged["volumeMounts"] == [{"name": "x", "mountPath": "/cache"}]


@pytest.mark.parametrize(
    ("patch", "field"),
    [
        ({"spec": "text"}, "podTemplate.spec: must be a mapping"),
        (
            {"spec": {"containers": {"name": "engine"}}},
            "podTemplate.spec.containers: is a mapping here but must be a list",
        ),
        ({"spec": {"containers": "engine"}}, "podTemplate.spec.containers: must be a list"),
        ({"spec": {"containers": ["engine"]}}, r"podTemplate.spec.containers\[0\]: must be a mapping with `name`"),
        (
            {"spec": {"containers": [{"image": "x"}]}},
            r"podTemplate.spec.containers\[0\]: must be a mapping with `name`",
        ),
        (
            {"metadata": {"labels": {"app": {"a": 1}}}},
            "podTemplate.metadata.labels.app: is a mapping here but must be a string",
        ),
    ],
)
def test_a_misfit_is_named_with_its_field(patch, field):
    with pytest.raises(TemplateError, match=field):
        merge(BASE, patch)


def test_the_labels_of_selectors_cannot_be_overridden():
    merged = merge_pod(BASE, {"metadata": {"labels": {"app": "evil", "team": "t"}}}, {"app": "x"})
    assert merged["metadata"]["labels"] == {"app": "x", "team": "t"}


@pytest.mark.parametrize("patch", [{"metadata": None}, {"spec": None}])
def test_the_template_itself_cannot_be_deleted(patch):
    with pytest.raises(TemplateError, match="must stay mappings"):
        merge_pod(BASE, patch, {})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text("ab", max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["spec", "env", "name", "a"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(["spec", "metadata", "env", "a"]), JSON, max_size=4))
def test_any_patch_either_fits_or_is_refused_and_never_changes_its_inputs(patch):
    base, before = copy.deepcopy(BASE), copy.deepcopy(patch)
    try:
        merge(base, patch)
    except TemplateError:
        pass
    assert (base, patch) == (BASE, before)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(["spec", "metadata", "a"]), JSON, max_size=3))
def test_merging_a_patch_twice_is_merging_it_once(patch):
    try:
        once = merge(BASE, patch)
    except TemplateError:
        return
    assert merge(once, patch) == once
