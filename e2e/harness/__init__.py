"""The end-to-end harness: a real Kubernetes cluster for tests, without containers where there is no container engine.

`cluster.py` decides which cluster the tests run on (KUBECONFIG, kind, or the built-in one), `controlplane.py` starts
the built-in one from the binaries of `build.py` inside a network namespace of `network.py`, `kubelet/` runs pods as
local processes, and `kube.py` with `sentences.py` is what tests are written in.
"""
