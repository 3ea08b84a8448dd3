"""The routing strategies a RoutingPolicy can name. A new one is a file here, a line below and a table of tests.

What each computes and means is listed in docs/policies.md.
"""

from kvfleet_router.core.policy import Policy
from kvfleet_router.policies.aibrix_preble import AIBrixPreble
from kvfleet_router.policies.aibrix_prefix_cache import AIBrixPrefixCache
from kvfleet_router.policies.dynamo_kv import DynamoKV
from kvfleet_router.policies.kubeai_prefix_hash import KubeAIPrefixHash
from kvfleet_router.policies.kvfleet import KVFleet, KVFleetLatency
from kvfleet_router.policies.least_request import LeastRequest
from kvfleet_router.policies.llmd_default import LLMDDefault
from kvfleet_router.policies.llmd_token_load import LLMDTokenLoad
from kvfleet_router.policies.lmetric import LMetric
from kvfleet_router.policies.power_of_two import PowerOfTwo
from kvfleet_router.policies.random import Random
from kvfleet_router.policies.round_robin import RoundRobin
from kvfleet_router.policies.sglang_cache_aware import SGLangCacheAware
from kvfleet_router.policies.ttft_min import TTFTMin

REGISTRY: dict[str, type[Policy]] = {
    "aibrix_preble": AIBrixPreble,
    "aibrix_prefix_cache": AIBrixPrefixCache,
    "dynamo_kv": DynamoKV,
    "kubeai_prefix_hash": KubeAIPrefixHash,
    "kvfleet": KVFleet,
    "kvfleet_latency": KVFleetLatency,
    "least_request": LeastRequest,
    "llmd_default": LLMDDefault,
    "llmd_token_load": LLMDTokenLoad,
    "lmetric": LMetric,
    "power_of_two": PowerOfTwo,
    "random": Random,
    "round_robin": RoundRobin,
    "sglang_cache_aware": SGLangCacheAware,
    "ttft_min": TTFTMin,
}
"""Strategy name -> policy class."""
