"""What counts as drift, and what is somebody else's business."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfleet_operator.reconcile.drift import difference, others_scale
from kvfleet_operator.reconcile.names import HASH, digest


def wanted(spec):
    manifest = {"kind": "Deployment", "metadata": {"name": "x", "labels": {"a": "b"}, "annotations": {}}, "spec": spec}
    manifest["metadata"]["annotations"][HASH] = digest(manifest)
    return manifest


def differs(ours, theirs):
    """The difference between a wanted spec and a live one that was applied from it and changed since."""
    manifest = wanted(ours)
    return difference(manifest, {**copy.deepcopy(manifest), "spec": theirs})


def test_an_object_as_applied_does_not_differ():
    assert differs({"replicas": 2, "args": ["a"]}, {"replicas": 2, "args": ["a"]}) is None


def test_what_others_added_is_theirs():
    ours = {"template": {"containers": [{"name": "engine", "image": "i"}]}}
    theirs = {
        "paused": False,
        "template": {"containers": [{"name": "sidecar"}, {"name": "engine", "image": "i", "tty": True}]},
    }
    assert differs(ours, theirs) is None


@pytest.mark.parametrize(
    ("ours", "theirs", "path"),
    [
        ({"replicas": 2}, {"replicas": 3}, "spec.replicas"),
        ({"replicas": 2}, {}, "spec.replicas"),
        ({"args": ["a", "b"]}, {"args": ["a"]}, "spec.args"),
        ({"args": ["a", "b"]}, {"args": ["a", "c"]}, "spec.args[1]"),
        (
            {"containers": [{"name": "e", "image": "1"}]},
            {"containers": [{"name": "e", "image": "2"}]},
            "spec.containers[e].image",
        ),
        ({"containers": [{"name": "e"}]}, {"containers": []}, "spec.containers[e]"),
        ({"selector": {"a": "b"}}, {"selector": {"a": "b", "c": "d"}}, "spec.selector"),
        ({"subjects": [{"name": "us"}]}, {"subjects": [{"name": "us"}, {"name": "them"}]}, "spec.subjects"),
        ({"limits": {"cpu": "1"}}, {"limits": {"cpu": "2"}}, "spec.limits.cpu"),
        ({"host": True}, {}, "spec.host"),
    ],
)
def test_drift_is_named_by_its_path(ours, theirs, path):
    assert differs(ours, theirs) == path


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"limits": {"cpu": "1000m"}}, {"limits": {"cpu": "1"}}),
        ({"limits": {"cpu": 0.5}}, {"limits": {"cpu": "500m"}}),
        ({"limits": {"memory": "1Gi"}}, {"limits": {"memory": "1073741824"}}),
        ({"requests": {"nvidia.com/gpu": 8}}, {"requests": {"nvidia.com/gpu": "8"}}),
        ({"requests": {"cpu": "1e3"}}, {"requests": {"cpu": "1k"}}),
        ({"sizeLimit": "0.5Gi"}, {"sizeLimit": "512Mi"}),
        ({"emptyDir": {}}, {}),
        ({"publishNotReadyAddresses": False}, {}),
        ({"args": []}, {}),
    ],
)
def test_another_spelling_of_the_same_is_no_drift(ours, theirs):
    assert differs(ours, theirs) is None


def test_a_wanted_change_differs_even_where_it_only_removes():
    old, new = wanted({"a": 1, "b": 2}), wanted({"a": 1})
    assert difference(new, old) == f"metadata.annotations.{HASH}"


def test_replicas_are_not_part_of_the_hash():
    assert digest(wanted({"replicas": 1, "a": 1})) == digest(wanted({"replicas": 7, "a": 1}))
    assert digest(wanted({"a": 1})) != digest(wanted({"a": 2}))


LEAVES = st.integers(1, 9) | st.text("xyz", min_size=1, max_size=3) | st.just(True)
SPECS = st.recursive(
    st.dictionaries(st.sampled_from("abc"), LEAVES, min_size=1, max_size=3),
    lambda inner: st.dictionaries(
        st.sampled_from("abc"), inner | st.lists(inner, min_size=1, max_size=2), min_size=1, max_size=2
    ),
    max_leaves=8,
)


def paths(value, path=()):
    """Paths to all leaves."""
    if isinstance(value, dict):
        return [p for key, inner in value.items() for p in paths(inner, (*path, key))]
    if isinstance(value, list):
        return [p for index, inner in enumerate(value) for p in paths(inner, (*path, index))]
    return [path]


@settings(max_examples=100, deadline=None)
@given(SPECS, st.data())
def test_changing_any_leaf_is_seen(spec, data):
    path = data.draw(st.sampled_from(paths(spec)))
    changed = copy.deepcopy(spec)
    place = changed
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = "changed"
    assert differs(spec, changed) is not None
    assert differs(spec, spec) is None


def test_the_owner_of_replicas_is_read_from_the_managed_fields():
    def live(*managers):
        entries = [
            {"manager": name, "fieldsV1": {"f:spec": {"f:replicas": {}} if owns else {"f:x": {}}}}
            for name, owns in managers
        ]
        return {"metadata": {"managedFields": entries}}

    assert not others_scale({"metadata": {}}, "us")
    assert not others_scale(live(("us", True), ("them", False)), "us")
    assert others_scale(live(("us", True), ("them", True)), "us")
