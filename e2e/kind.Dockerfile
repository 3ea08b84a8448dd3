# What stands in for real images on kind; on the built-in cluster the table in harness/settings.py does.
#
#   docker build -f e2e/kind.Dockerfile --target vllm -t vllm/vllm-openai:TAG e2e
ARG KVFLEET_IMAGE=ghcr.io/kvfleet/kvfleet:dev

FROM ${KVFLEET_IMAGE} AS vllm
# `vllm serve MODEL …` → the simulated worker with the same arguments.
COPY --chmod=755 vllm.sh /opt/kvfleet/bin/vllm
ENTRYPOINT ["vllm", "serve"]

FROM ${KVFLEET_IMAGE} AS web
COPY harness/web.py /opt/web.py
ENTRYPOINT ["python", "/opt/web.py"]
