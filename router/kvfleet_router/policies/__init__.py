"""The routing strategies a RoutingPolicy can name. A new one is a file here, a line below and a table of tests."""

from kvfleet_router.core.policy import Policy
from kvfleet_router.policies.kvfleet import KVFleet, KVFleetLatency
from kvfleet_router.policies.least_request import LeastRequest
from kvfleet_router.policies.lmetric import LMetric
from kvfleet_router.policies.power_of_two import PowerOfTwo
from kvfleet_router.policies.random import Random
from kvfleet_router.policies.round_robin import RoundRobin
from kvfleet_router.policies.ttft_min import TTFTMin

REGISTRY: dict[str, type[Policy]] = {
    "kvfleet": KVFleet,
    "kvfleet_latency": KVFleetLatency,
    "least_request": LeastRequest,
    "lmetric": LMetric,
    "power_of_two": PowerOfTwo,
    "random": Random,
    "round_robin": RoundRobin,
    "ttft_min": TTFTMin,
}
"""Strategy name -> policy class."""
