"""What several processes say, as one: sums that never fall, the worst of what is no sum, the latest decisions of all."""

import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvfleet_router.io.processes import merge

HEAD = """\
# TYPE kvfleet_router_requests_total counter
kvfleet_router_requests_total{{outcome="ok"}} {ok}
# TYPE kvfleet_router_ttft_seconds histogram
kvfleet_router_ttft_seconds_bucket{{le="0.1"}} {ok}
kvfleet_router_ttft_seconds_bucket{{le="+Inf"}} {ok}
kvfleet_router_ttft_seconds_count {ok}
kvfleet_router_ttft_seconds_sum {seconds}
# TYPE kvfleet_router_in_flight gauge
kvfleet_router_in_flight{{pool="a"}} {in_flight}
# TYPE kvfleet_router_workers gauge
kvfleet_router_workers{{pool="a",state="ready"}} {ready}
kvfleet_router_workers{{pool="a",state="ejected"}} {ejected}
# TYPE kvfleet_router_kubernetes_connected gauge
kvfleet_router_kubernetes_connected {connected}
# TYPE kvfleet_router_config_refused gauge
kvfleet_router_config_refused {refused}
# TYPE kvfleet_router_predicted_ttft_seconds gauge
kvfleet_router_predicted_ttft_seconds{{pool="a"}} {predicted}
"""


def text(ok=0, seconds=0.0, in_flight=0, ready=4, ejected=0, connected=1, refused=0, predicted=1.0):
    return HEAD.format(**locals())


def samples(exposition):
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(exposition.decode())
        for sample in family.samples
    }


def test_sums_least_worst_and_mean():
    shown = samples(
        merge.MetricsMerge().merge(
            {
                "a": text(ok=3, seconds=1.5, in_flight=2, predicted=1.0),
                "b": text(ok=4, seconds=0.5, in_flight=1, ready=3, ejected=1, connected=0, refused=1, predicted=3.0),
            }
        )
    )
    assert shown["kvfleet_router_requests_total", "ok"] == 7
    assert shown["kvfleet_router_ttft_seconds_bucket", "+Inf"] == shown["kvfleet_router_ttft_seconds_count",] == 7
    assert shown["kvfleet_router_ttft_seconds_sum",] == 2.0
    assert shown["kvfleet_router_in_flight", "a"] == 3
    assert (shown["kvfleet_router_workers", "a", "ready"], shown["kvfleet_router_workers", "a", "ejected"]) == (3, 1)
    assert (shown["kvfleet_router_kubernetes_connected",], shown["kvfleet_router_config_refused",]) == (0, 1)
    assert shown["kvfleet_router_predicted_ttft_seconds", "a"] == 2.0


def test_counters_never_fall_when_a_process_dies_is_silent_or_starts_again():
    merged = merge.MetricsMerge()
    seen = []
    for a in (text(ok=10, in_flight=1), None, text(ok=1), text(ok=2), None, text(ok=0), text(ok=5)):
        shown = samples(merged.merge({"a": a, "b": text(ok=100, in_flight=1)}))
        seen.append((shown["kvfleet_router_requests_total", "ok"], shown["kvfleet_router_in_flight", "a"]))
    assert seen == [(110, 2), (110, 1), (111, 1), (112, 1), (112, 1), (112, 1), (117, 1)]


@pytest.mark.parametrize(
    ("told", "missing", "complete", "status"),
    [
        (["ready", "ready"], 0, True, 200),
        (["ready"], 1, True, 200),
        (["ready"], 1, False, 503),
        (["ready", "draining"], 0, True, 503),
        ([], 2, True, 503),
    ],
)
def test_ready_when_all_that_answer_are(told, missing, complete, status):
    documents = [{"status": each, "revision": "abc"} for each in told]
    assert merge.ready(documents, missing, complete=complete)[0] == status


def test_the_latest_decisions_of_all():
    one = {"decisions": [{"id": "a-1", "time": 3.0}, {"id": "a-0", "time": 1.0}]}
    other = {"decisions": [{"id": "b-0", "time": 2.0}]}
    assert [d["id"] for d in orjson.loads(merge.decisions([one, other], 2))["decisions"]] == ["a-1", "b-0"]


def test_nothing_is_said_to_be_served_while_processes_differ():
    policy = {"generation": 1, "revision": "p1"}
    new = {"revision": "r2", "policies": {"p": policy, "q": policy}, "refused": None, "pools": {}, "more": 1}
    other = {"p": policy, "q": {**policy, "revision": "p0"}}
    old = {"revision": "r1", "policies": other, "refused": "why", "pools": {}, "more": 1}
    assert orjson.loads(merge.loaded([new, new])) == new
    assert orjson.loads(merge.loaded([new, old])) == {
        "revision": "",
        "policies": {"p": policy},
        "refused": "why",
        "pools": {},
        "more": 1,
    }


def energy(trusted, intervals):
    return {"mode": "Approximate", "energy": {"trusted": trusted, "intervals": intervals}}


@pytest.mark.parametrize(
    ("said", "told"), [([(True, 3), (True, 9)], (True, 9)), ([(True, 9), (False, 3), (True, 1)], (False, 3))]
)
def test_of_a_pools_energy_the_most_doubtful_is_told_else_the_most_learned(said, told):
    base = {"revision": "r", "policies": {}, "refused": None}
    documents = [{**base, "pools": {"a": energy(*words), "b": {"mode": "Precise"}}} for words in said]
    pools = orjson.loads(merge.loaded(documents))["pools"]
    assert pools == {"a": energy(*told), "b": {"mode": "Precise"}}


def test_a_worker_is_ready_where_all_say_so():
    worker = {"name": "w", "state": "ready", "in_flight": 2}
    told = merge.workers([{"workers": [worker]}, {"workers": [{**worker, "state": "ejected", "in_flight": 3}]}])
    assert orjson.loads(told)["workers"] == [{"name": "w", "state": "ejected", "in_flight": 3}]
