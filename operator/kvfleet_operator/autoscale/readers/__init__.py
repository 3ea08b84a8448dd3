"""The I/O beside the pure decisions: readers that turn signals into readings.

`prometheus` asks a Prometheus server; `routers` scrapes the routers (and, for KV usage, the workers) itself, so that
autoscaling works without Prometheus. Both judge what they got by the same rules and never raise for what a server did:
a reading says what is wrong with it.
"""
