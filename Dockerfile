# The one image of kvfleet: operator, router and command line. Two stages: pip and the sources stay in the first.
#
#   docker build -t ghcr.io/kvfleet/kvfleet:dev .
#
# Another base (a mirror, or the tag with its digest): --build-arg PYTHON_IMAGE=…
ARG PYTHON_IMAGE=python:3.13.13-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY crds/ crds/
COPY operator/ operator/
COPY router/ router/
COPY sim/ sim/
COPY cli/ cli/
COPY examples/ examples/
COPY scripts/compile_router.py scripts/install_wheel.sh scripts/
COPY hatch_build.py ./
# The router's hot path is compiled to C (scripts/compile_router.py): about half the CPU per request. Compiler and headers stay in
# this stage. --build-arg COMPILE=0 leaves it plain Python: a much faster build, and the same image but for its speed.
ARG COMPILE=1
RUN if [ "$COMPILE" = 1 ]; then \
      apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi
RUN sh scripts/install_wheel.sh "$COMPILE" /opt/kvfleet

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="kvfleet" \
      org.opencontainers.image.description="Operator and router for fleets of LLM inference workers" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/kvfleet /opt/kvfleet
# USER and HOME: the uid has no passwd entry (platforms may assign another), and kopf asks for the user's name.
ENV PATH=/opt/kvfleet/bin:$PATH USER=kvfleet HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 65532:65532
WORKDIR /tmp
ENTRYPOINT ["kvfleet"]
