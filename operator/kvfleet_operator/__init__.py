"""The operator: from the four kinds to running workers and routers, and back to their status.

Reading order:

- `reconcile`: pure. Objects as read → objects as wanted, and the conditions that say how far that is.
- `render`: the same wanted objects without a cluster.
- `api`, `apply`: the API server as a client sees it; server-side apply with one field manager.
- `world`, `workqueue`, `controller`: the observed objects, the keyed queue, one `reconcile(key)` per kind.
- `resync`, `reports`: what watches may have missed; what the router replicas serve with.
- `adapters`: LoRA adapters of running workers.
- `lease`, `health`, `metrics`, `main`: one leader at a time, probes, Prometheus metrics, the process.
- `handlers`: the only module that knows kopf; it feeds watch events into the world.
- `rbac`: exactly the permissions all this needs.
"""
