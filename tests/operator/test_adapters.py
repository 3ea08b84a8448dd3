"""Adapters of running workers: what to call, what the engine's answers mean, and what the condition says."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet_operator.reconcile import adapters
from kvfleet_operator.reconcile.adapters import WORKER, Call, NoList, WorkerAdapters, calls, read_models, verdict
from kvfleet_operator.reconcile.rollout import Rollout

LOAD, UNLOAD = Call("load", "sql", "my-org/sql"), Call("unload", "sql")

# Which calls


def test_what_is_missing_is_loaded_and_what_is_too_much_unloaded_first():
    assert calls({"sql": "/a", "law": "/b"}, {"law": "/b", "old": "/c", "mine": "/d"}, {"mine"}) == [
        Call("unload", "old"),
        Call("load", "sql", "/a"),
    ]


def test_calls_are_vllms():
    assert (LOAD.path, LOAD.body) == ("/v1/load_lora_adapter", {"lora_name": "sql", "lora_path": "my-org/sql"})
    assert (UNLOAD.path, UNLOAD.body) == ("/v1/unload_lora_adapter", {"lora_name": "sql"})


def test_a_new_uri_under_an_old_name_calls_for_nothing():
    """vLLM would answer from the prefix cache of the former adapter."""
    assert calls({"sql": "/new"}, {"sql": "/old"}, ()) == []


PATHS = st.dictionaries(st.sampled_from("abcdef"), st.sampled_from(["/x", "/y"]))


@given(PATHS, PATHS, st.sets(st.sampled_from("abcdef")))
def test_calls_lead_to_the_wanted_adapters_and_then_there_are_none(want, loaded, static):
    now = dict(loaded)
    for call in calls(want, loaded, static):
        if call.action == "load":
            assert call.name not in now
            now[call.name] = call.uri
        else:
            assert call.name not in static
            del now[call.name]
    assert now.keys() == want.keys() | (loaded.keys() & static)
    assert calls(want, now, static) == []


# What a worker has


def test_adapters_are_the_models_with_a_parent():
    cards = [
        {"id": "tiny", "object": "model", "root": "m_nfc", "parent": None, "max_model_len": 1024},
        {"id": "pre", "object": "model", "root": "lora_b", "parent": "tiny", "max_model_len": None},
    ]
    assert read_models(json.dumps({"object": "list", "data": cards}).encode()) == {"pre": "lora_b"}


@pytest.mark.parametrize(
    "body",
    [
        b"", b"x", b"[]", b"null", b'{"data": 1}', b'{"data": [1]}', b'{"data": [{"parent": "a"}]}', b"[" * 100_000, b"\xff",
        json.dumps({"data": [{"id": str(i), "parent": "a"} for i in range(5000)]}).encode(),
    ],
)  # fmt: skip
def test_what_is_no_list_of_models_is_told_apart(body):
    with pytest.raises(NoList, match="GET /v1/models"):
        read_models(body)


# What answers mean: as recorded from vLLM


def error(message, type_="InternalServerError", code=500):
    return json.dumps({"error": {"message": message, "type": type_, "param": None, "code": code}}).encode()


ALREADY = "The lora adapter 'sql' has already been loaded. If you want to load the adapter in place, set 'load_inplace' to True."
FAILED = "Call to add_lora method failed: Worker failed with error '{}', please check the stack trace above for the root cause"
ABSENT = b'{"detail":"Not Found"}'


@pytest.mark.parametrize(
    ("call", "status", "body"),
    [
        (LOAD, 200, b"Success: LoRA adapter 'sql' added successfully."),
        (LOAD, 400, error(ALREADY, "InvalidUserInput", 400)),
        (UNLOAD, 200, b"Success: LoRA adapter 'sql' removed successfully."),
        (UNLOAD, 404, error("The lora adapter 'sql' cannot be found.", "NotFoundError", 404)),
    ],
)
def test_what_is_so_already_is_as_good_as_done(call, status, body):
    assert verdict(call, status, body) is None


@pytest.mark.parametrize(
    ("call", "status", "body", "words"),
    [
        (
            LOAD, 404, error("Loading lora sql failed: No adapter found for no/such/dir", "NotFoundError", 404),
            "No adapter found for no/such/dir: correct its uri",
        ),
        (
            LOAD, 500, error(FAILED.format("LoRA rank 64 is greater than max_lora_rank 8.")),
            "LoRA rank 64 is greater than max_lora_rank 8. set --max-lora-rank in engine.args",
        ),
        (LOAD, 500, error(FAILED.format("/x doesn't contain tensors")), "/x doesn't contain tensors (HTTP 500)"),
        (LOAD, 404, ABSENT, "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        (UNLOAD, 404, ABSENT, "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        (LOAD, 401, b'{"error":"Unauthorized"}', "API key: remove it"),
        (LOAD, 400, error("Both 'lora_name' and 'lora_path' must be provided.", "InvalidUserInput", 400), "(HTTP 400)"),
        (LOAD, 502, b"", "no reason given (HTTP 502)"),
        (LOAD, 500, b"[" * 100_000, "(HTTP 500)"),
    ],
)  # fmt: skip
def test_what_went_wrong_is_said_with_the_remedy(call, status, body, words):
    said = verdict(call, status, body)
    assert said is not None and words in said
    assert len(said) < 2 * adapters.MAX_WORDS


# What the condition says

SQL, LAW = {"name": "sql", "uri": "/a"}, {"name": "law", "uri": "/b"}
ALL = WorkerAdapters({"sql": "/a", "law": "/b"})
RUNNING = Rollout(wanted=2, existing=2, ready=2, updated=2, observed=True, settled=True, stuck="")


@pytest.mark.parametrize(
    ("workers", "status", "reason", "words"),
    [
        ({"w1": ALL, "w2": ALL}, "True", "Loaded", "2 adapter(s) on every ready worker (2)"),
        ({"w1": ALL, "w2": None}, "True", "Loaded", "2 adapter(s) on every ready worker (1)"),
        ({"w1": None}, "Unknown", "Loading", "sql, law: not yet on every ready worker"),
        ({"w1": ALL, "w2": WorkerAdapters({"sql": "/a"})}, "Unknown", "Loading", "law: not yet"),
        ({}, "Unknown", "NoneReady", "No worker is ready."),
        ({"w1": ALL, "w2": WorkerAdapters(lora=False)}, "Unknown", "RollingOut", "1 of 2 ready workers run without LoRA"),
        (
            {f"w{i}": WorkerAdapters({"sql": "/a"}, {"law": "no such path"}) for i in range(4)},
            "False", "LoadFailed", "law: no such path (w0, w1 and 2 more)",
        ),
        ({"w1": ALL, "w2": WorkerAdapters({}, {WORKER: "refused"})}, "False", "Unreachable", "refused (w2)"),
        ({"w1": WorkerAdapters({**ALL.loaded, "old": "/c"}, {"old": "busy"})}, "False", "UnloadFailed", "old: busy (w1)"),
        ({"w1": WorkerAdapters({"sql": "/former", "law": "/b"})}, "False", "UriChanged", "sql: loaded from /former"),
    ],
)  # fmt: skip
def test_the_condition_says_how_far_it_is(make, workers, status, reason, words):
    spec = make.parse(make.pool(adapters=[SQL, LAW])).spec
    found = adapters.finding(spec, RUNNING, workers)
    assert (found.type, found.status, found.reason) == ("AdaptersLoaded", status, reason)
    assert words in found.message


def test_a_pool_at_zero_has_nothing_to_load_into(make):
    spec = make.parse(make.pool(adapters=[SQL])).spec
    at_zero = Rollout(wanted=0, existing=0, ready=0, updated=0, observed=True, settled=True, stuck="")
    assert adapters.finding(spec, at_zero, {}).reason == "ScaledToZero"
    assert adapters.finding(spec, None, {}).reason == "NoneReady"


def test_adapters_of_a_pool_that_forbids_lora_are_refused(make):
    spec = make.parse(make.pool(adapters=[SQL], engine={"args": ["--no-enable-lora"]})).spec
    found = adapters.finding(spec, RUNNING, {"w1": WorkerAdapters(lora=False)})
    assert (found.status, found.reason) == ("False", "LoraDisabled")


def test_an_adapter_from_elsewhere_than_wanted_is_not_everywhere():
    want = {"sql": "/a", "law": "/b"}
    assert adapters.everywhere(want, {"w1": ALL, "w2": WorkerAdapters({"sql": "/x", "law": "/b"})}) == ["law"]
    assert adapters.everywhere(want, {"w1": None}) == []
