"""An autoscaled pool with a router replica whose metrics a test sets, for tests of the autoscaler at work."""

import asyncio
import contextlib
from dataclasses import dataclass, field

import operator_manifests


@dataclass
class Router:
    """What the router replica's /metrics say."""

    in_flight: float = 0
    queued: float = 0
    served: float = 0
    pack_target: float = 12.5
    """Workers are filled to 80 % of it: 10."""
    workers: dict = field(default_factory=dict)
    """Worker → (requests in flight, cached tokens)."""
    silent: bool = False
    asked: int = 0

    def page(self):
        pool = 'pool="llama"'
        lines = [
            f"kvfleet_router_in_flight{{{pool}}} {self.in_flight}",
            f"kvfleet_router_packed_sequences{{{pool}}} {self.in_flight}",
            f"kvfleet_router_pack_target_sequences{{{pool}}} {self.pack_target}",
            f"kvfleet_router_predicted_ttft_seconds{{{pool}}} 0.1",
            f'kvfleet_router_queue_depth{{policy="policy",model="llama-8b"}} {self.queued}',
            f'kvfleet_router_requests_total{{model="llama-8b",pool="llama",policy="policy",outcome="ok"}} {self.served}',
        ]
        for worker, (in_flight, cached) in self.workers.items():
            lines.append(f'kvfleet_router_worker_in_flight{{{pool},worker="{worker}"}} {in_flight}')
            lines.append(f'kvfleet_router_worker_cached_tokens{{{pool},worker="{worker}"}} {cached}')
        return "\n".join(lines) + "\n"


@contextlib.asynccontextmanager
async def listening(router, port):
    """`router` at its admin port."""

    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        router.asked += 1
        if not router.silent:
            body = router.page().encode()
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    async with server:
        yield router


def put_fleet(cluster, make, port, **autoscaling):
    """Profile, policy, router with one ready replica, and the pool."""
    cluster.put(make.profile())
    cluster.put(make.policy())
    cluster.put(make.router(adminPort=port))
    cluster.put(make.router_pod())
    cluster.put(make.pool(autoscaling={"minReplicas": 1, "maxReplicas": 8, **autoscaling}))


def replicas(cluster):
    found = cluster.get("Deployment", "llama-workers")
    return found and found["spec"]["replicas"]


def worker_pod(name, pool="llama", ready_at="2026-01-01T00:02:00Z"):
    """A ready worker without adapters, created at midnight."""
    return operator_manifests.worker_pod(name, pool=pool, since=ready_at, with_lora=False)
