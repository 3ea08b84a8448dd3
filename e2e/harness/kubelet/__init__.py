"""The process kubelet: nodes whose containers are local processes.

It speaks to the API server as a kubelet does (registers nodes, renews their leases, watches the pods bound to them,
reports their status, ends them with grace) and runs each container as a process in namespaces of its own over an
overlay of the machine's file system (`sandbox.py`). An image is a row in a table: which programs it brings, and what
it starts by default (`images.py`).

    __main__  reads the configuration, starts the parts
    manager   one worker for each pod bound to our nodes      node      registration and leases
    worker    a pod's life from volumes to removal            container one container's life: start, probes, restarts
    sandbox   a process with mounts, namespaces, a pod's IP   probes    startup, readiness, liveness
    volumes   configMap, secret, projected, emptyDir          env       a container's environment
    status    pod status out of container states              server    logs for `kubectl logs`, signals for tests
    store     what the watches have seen                      api       the API client

`env`, `status`, `images` and the projection in `volumes` are pure. What it cannot do is refused by name
(`worker.unsupported`), never half done.
"""
