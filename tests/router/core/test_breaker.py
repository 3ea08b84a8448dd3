"""The circuit breaker: opens after consecutive failures, probes after a pause that doubles."""

from kvfleet_router.core.breaker import FIRST_PAUSE_S, LONGEST_PAUSE_S, MAX_CONSECUTIVE_FAILURES, Breaker


def open_breaker():
    breaker = Breaker()
    opened = [breaker.failure(0.0) for _ in range(MAX_CONSECUTIVE_FAILURES)]
    assert opened == [False] * (MAX_CONSECUTIVE_FAILURES - 1) + [True]
    return breaker


def test_a_success_between_failures_keeps_it_closed():
    breaker = Breaker()
    for _ in range(10):
        assert not breaker.failure(0.0)
        assert not breaker.failure(0.0)
        assert not breaker.success()
    assert breaker.open_until is None


def test_probation_begins_after_the_pause_and_a_success_closes_the_circuit():
    breaker = open_breaker()
    assert not breaker.elapsed(FIRST_PAUSE_S / 2)
    assert breaker.elapsed(FIRST_PAUSE_S)
    assert breaker.on_probation
    assert not breaker.elapsed(FIRST_PAUSE_S)
    assert breaker.success()
    assert (breaker.on_probation, breaker.open_until) == (False, None)


def test_a_failure_on_probation_opens_it_for_twice_as_long_up_to_a_limit():
    breaker, now, pauses = open_breaker(), 0.0, []
    for _ in range(10):
        pauses.append(breaker.open_until - now)
        now = breaker.open_until
        assert breaker.elapsed(now)
        assert breaker.failure(now)
    assert pauses[:4] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S, 8 * FIRST_PAUSE_S]
    assert max(pauses) == LONGEST_PAUSE_S


def test_a_probe_is_due_after_the_pause_and_only_once_at_a_time():
    breaker = open_breaker()
    assert not breaker.begin_probe(FIRST_PAUSE_S / 2)
    assert breaker.begin_probe(FIRST_PAUSE_S)
    assert not breaker.begin_probe(FIRST_PAUSE_S)
    assert not breaker.probed(1.5, False, 2.0, "status 503")
    assert (breaker.open_until, breaker.on_probation, breaker.probe_told) == (3.5, False, "status 503")
    assert not breaker.begin_probe(3.4)
    assert breaker.begin_probe(3.5)
    assert breaker.probed(3.6, True, 2.0, "status 200")
    assert (breaker.open_until, breaker.on_probation) == (None, True)


def test_a_probe_that_says_no_does_not_open_what_a_request_has_closed():
    breaker = open_breaker()
    assert breaker.begin_probe(FIRST_PAUSE_S)
    assert breaker.success()
    assert not breaker.probed(2.0, False, 2.0, "status 503")
    assert breaker.open_until is None


def test_a_probe_from_before_the_latest_ejection_says_nothing():
    breaker = open_breaker()
    assert breaker.begin_probe(FIRST_PAUSE_S)
    assert breaker.success()
    assert [breaker.failure(1.5) for _ in range(MAX_CONSECUTIVE_FAILURES)][-1]
    assert not breaker.probed(1.6, True, 2.0, "status 200")
    assert breaker.open_until == 1.5 + FIRST_PAUSE_S
    assert not breaker.on_probation


def test_failed_probes_do_not_lengthen_the_pause_of_failed_requests():
    breaker = open_breaker()
    now = FIRST_PAUSE_S
    for _ in range(5):
        assert breaker.begin_probe(now)
        assert not breaker.probed(now, False, 2.0, "")
        now += 2.0
    assert breaker.begin_probe(now)
    assert breaker.probed(now, True, 2.0, "")
    assert breaker.failure(now)
    assert breaker.open_until == now + 2 * FIRST_PAUSE_S


def fail_now_and_then(breaker, share, requests):
    """Failures spread evenly; how many requests it took until the circuit opened."""
    failures = 0.0
    for number in range(requests):
        failures += share
        if failures >= 1.0:
            failures -= 1.0
            if breaker.failure(0.0, 0.4):
                return number + 1
        else:
            breaker.success()
    return None


def test_a_worker_that_fails_too_large_a_share_is_ejected_though_never_twice_in_a_row():
    assert fail_now_and_then(Breaker(), 0.5, 100) in range(8, 30)
    assert fail_now_and_then(Breaker(), 0.3, 1000) is None


def test_an_outlier_is_not_forgiven_by_one_success():
    breaker = Breaker()
    fail_now_and_then(breaker, 0.5, 100)
    first = breaker.open_until
    assert breaker.elapsed(first)
    assert breaker.success(whole=False)
    assert not breaker.success()
    assert breaker.failure(first, 0.4)
    assert breaker.open_until - first == 2 * FIRST_PAUSE_S


def test_who_recovers_is_forgiven():
    breaker = Breaker()
    fail_now_and_then(breaker, 0.5, 100)
    assert breaker.elapsed(breaker.open_until)
    for _ in range(20):
        breaker.success()
    assert not any(breaker.failure(100.0, 0.4) for _ in range(2))
    assert breaker.failure(100.0, 0.4)
    assert breaker.open_until == 100.0 + FIRST_PAUSE_S


def test_failures_of_requests_still_in_flight_do_not_prolong_the_pause():
    breaker = open_breaker()
    until = breaker.open_until
    assert not breaker.failure(0.5)
    assert breaker.open_until == until
