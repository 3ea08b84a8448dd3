"""`kvfleet router`: from what the command line says to a running router."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvfleet.inputs import (
    LOG_FORMAT,
    UsageError,
    check_strategies,
    checked_log_level,
    compile_fleet_config,
    load_manifests,
    read_fleet_config,
)

if TYPE_CHECKING:
    from kvfleet_router.io.config_source import ConfigSource


def router(
    filename: Annotated[
        list[Path] | None, typer.Option("-f", "--filename", help="Manifests: file or directory.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="Compiled FleetConfig (JSON), reloaded when it changes. With --kubernetes: used while the ConfigMap cannot be read at the start."
        ),
    ] = None,
    workers: Annotated[
        list[str] | None,
        typer.Option(help="Workers: `URL,URL,…` without manifests; `POOL=URL,URL` (repeat) with -f."),
    ] = None,
    strategy: Annotated[str | None, typer.Option(help="Policy; with -f it replaces every policy's strategy.")] = None,
    kubernetes: Annotated[
        bool,
        typer.Option(
            "--kubernetes",
            help="Inside a cluster: watch the ConfigMap of --config-map and the workers' EndpointSlices.",
        ),
    ] = False,
    config_map: Annotated[
        str, typer.Option(envvar="KVFLEET_CONFIG_MAP", help="NAMESPACE/NAME of the ConfigMap with the FleetConfig.")
    ] = "",
    kubeconfig: Annotated[
        Path | None, typer.Option(help="As --kubernetes, but the API server and credentials of this file.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on (IPv4, IPv6 or unix:PATH; several with commas between).")
    ] = "0.0.0.0",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port for clients.")] = 8080,
    admin_host: Annotated[str | None, typer.Option(help="Address of the admin port. Default: --host.")] = None,
    admin_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of /metrics, /healthz, /decisions.")] = 9090,
    tls_cert: Annotated[
        Path | None, typer.Option(help="PEM file of the certificate chain: clients are served by TLS.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of the certificate's key.")] = None,
    api_keys_file: Annotated[
        Path | None, typer.Option(help="File of `NAME:SHA256` lines: clients must send one of these keys.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="With --workers alone: directory with the model's tokenizer.json and chat template. Cached prefixes are then known by the engines' KV events."
        ),
    ] = None,
    kv_events_port: Annotated[
        int, typer.Option(min=1, max=65535, help="With --tokenizer: where engines publish KV events.")
    ] = 5557,
    kv_replay_port: Annotated[
        int, typer.Option(min=1, max=65535, help="With --tokenizer: where engines repeat KV events.")
    ] = 5558,
    processes: Annotated[
        int, typer.Option(min=1, max=64, help="Processes that serve the port together, each on a core of its own.")
    ] = 1,
    redis_url: Annotated[
        str | None,
        typer.Option(
            envvar="KVFLEET_REDIS_URL",
            help="Redis server (redis://, rediss://, unix://) over which replicas of the router tell each other their loads.",
        ),
    ] = None,
    redis_password_file: Annotated[Path | None, typer.Option(help="File with the Redis server's password.")] = None,
    redis_ca_file: Annotated[
        Path | None, typer.Option(help="Certificates to trust at the Redis server, with rediss://.")
    ] = None,
    worker_ca_file: Annotated[
        Path | None,
        typer.Option(
            help="PEM file of the certificates to trust at workers with https:// addresses. Default: the system's."
        ),
    ] = None,
    worker_server_name: Annotated[
        str | None,
        typer.Option(help="Name that workers' certificates are for. Default: the host of each worker's address."),
    ] = None,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            envvar="OTEL_EXPORTER_OTLP_ENDPOINT",
            help="OpenTelemetry collector (OTLP over HTTP) that gets a span per request, such as http://localhost:4318.",
        ),
    ] = None,
    trace_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Of requests that carry no traceparent, the share that is traced.")
    ] = 1.0,
    speed: Annotated[float, typer.Option(min=0.01, max=1000, help="For workers run with --speed.")] = 1.0,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve the OpenAI API in front of a fleet of vLLM workers.

    The fleet comes from manifests (-f), from a compiled FleetConfig (--config), from a cluster (--kubernetes), or is just a
    list of workers.

    Examples: `kvfleet router --port 8080 --workers http://10.0.0.1:8000,http://10.0.0.2:8000` · `kvfleet router -f manifests/ --workers my-pool=http://10.0.0.1:8000` · `kvfleet router --workers http://127.0.0.1:8000 --strategy least_request`
    """
    import logging

    from kvfleet import fleet
    from kvfleet_api.compile import static_fleet
    from kvfleet_api.fleetconfig import FleetConfig
    from kvfleet_router.app import run_router
    from kvfleet_router.io.sharing.redis_bus import Redis

    logging.basicConfig(level=checked_log_level(log_level), format=LOG_FORMAT)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every request
    in_cluster = kubernetes or kubeconfig is not None
    if in_cluster and (filename or workers):
        raise UsageError("--kubernetes: pools and workers are read from the cluster: leave -f and --workers out")
    if admin_host is None and "unix:" in host:
        raise UsageError("--host has a Unix socket: say with --admin-host where the admin port shall be (127.0.0.1)")
    if otlp_endpoint is not None and not otlp_endpoint.startswith(("http://", "https://")):
        raise UsageError(f"--otlp-endpoint {otlp_endpoint}: give a URL such as http://localhost:4318")
    if filename and config is not None:
        raise UsageError("-f and --config exclude each other: the FleetConfig is compiled from the manifests")
    if not (filename or config or workers or in_cluster):
        raise UsageError("no fleet: give -f MANIFESTS, --config FILE, --kubernetes or --workers URL,URL,…")
    if tokenizer is not None:
        if filename or config or in_cluster:
            raise UsageError("--tokenizer goes with --workers alone: else set spec.model.tokenizer in the ModelPool")
        if not tokenizer.exists():
            raise UsageError(
                f"--tokenizer {tokenizer}: no such directory: give one that holds the model's tokenizer.json"
            )
    source = _kubernetes_source(kubeconfig, config_map, config, strategy) if in_cluster else None
    try:
        if in_cluster:
            fleet_config = FleetConfig(pools=[], policies=[])
        elif filename:
            fleet_config = fleet.with_workers(compile_fleet_config(load_manifests(filename)), workers or [])
        elif config is not None:
            fleet_config = read_fleet_config(config)
        else:
            fleet_config = static_fleet(
                [url.strip() for entry in workers or [] for url in entry.split(",") if url.strip()],
                tokenizer_path=None if tokenizer is None else str(tokenizer.resolve()),
                kv_events_port=kv_events_port,
                kv_replay_port=kv_replay_port,
            )
    except ValueError as error:
        raise UsageError(f"--workers {error}") from error
    if filename and redis_url is None:  # it is the only one, whatever its FleetRouter says
        fleet_config = fleet_config.model_copy(update={"routers": processes})
    if strategy is not None:
        fleet_config = fleet.with_strategy(fleet_config, strategy)
    check_strategies([policy.strategy for policy in fleet_config.policies])
    if redis_url is None and (redis_password_file or redis_ca_file):
        raise UsageError("--redis-password-file and --redis-ca-file go with a server: give --redis-url, too")
    channel = f"kvfleet:{config_map or f'{fleet_config.namespace}/{fleet_config.name}'}"
    redis = None if redis_url is None else Redis(redis_url, channel, redis_password_file, redis_ca_file)
    code = run_router(
        fleet_config,
        host=host,
        port=port,
        admin_host=admin_host or host,
        admin_port=admin_port,
        speed=speed,
        config_path=config,
        adapt=None if strategy is None else lambda reloaded: fleet.with_strategy(reloaded, strategy),
        source=source,
        tls_cert=tls_cert,
        tls_key=tls_key,
        api_keys_file=api_keys_file,
        processes=processes,
        redis=redis,
        worker_ca_file=worker_ca_file,
        otlp_endpoint=otlp_endpoint,
        trace_share=trace_share,
        worker_server_name=worker_server_name,
    )
    raise typer.Exit(code)


def _kubernetes_source(
    kubeconfig: Path | None, config_map: str, fallback: Path | None, strategy: str | None
) -> ConfigSource:
    """What a router in a cluster follows."""
    from kvfleet import fleet
    from kvfleet_router.io.kubernetes import KubernetesSource
    from kvfleet_router.io.kubernetes_access import AccessError, from_kubeconfig, in_cluster

    if strategy is not None:
        check_strategies([strategy])
    if not config_map:
        raise UsageError("--config-map: which ConfigMap holds the FleetConfig? Give NAMESPACE/NAME")
    try:
        access = in_cluster() if kubeconfig is None else from_kubeconfig(kubeconfig)
        adapt = None if strategy is None else lambda config: fleet.with_strategy(config, strategy)
        return KubernetesSource(access, config_map, fallback=fallback, adapt=adapt)
    except AccessError as error:
        raise UsageError(str(error)) from error
