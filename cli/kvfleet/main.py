"""The command line: one function a command, each a thin shell around a package. Heavy imports stay inside the commands.

Exit codes: 0 done, 1 failed, 2 wrong usage or wrong manifests, 130 interrupted.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvfleet import __version__
from kvfleet.energy_command import calibrate, energy
from kvfleet.inputs import (
    LOG_FORMAT,
    UsageError,
    check_strategies,
    checked_log_level,
    compile_fleet_config,
    escaped,
    load_manifests,
    render_objects,
)
from kvfleet.router_command import router
from kvfleet.tokenizer_command import tokenizer

app = typer.Typer(
    name="kvfleet",
    help="Fleets of LLM inference workers on Kubernetes: least time to first token, least energy, no lost request.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

Files = Annotated[
    list[Path],
    typer.Option("-f", "--filename", help="Manifest file or directory; repeat for several. `-`: standard input."),
]


def main() -> None:
    """Entry point of the command `kvfleet`."""
    try:
        app()
    except UsageError as error:
        Console(stderr=True, highlight=False).print(f"[red]error:[/red] {escaped(str(error))}", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"kvfleet {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def quickstart_directory() -> Path:
    """`examples/quickstart`: beside the sources of a checkout, else as installed with the package."""
    here = Path(__file__).parent
    return next((d for d in (here / "_examples", here.parents[1] / "examples") if d.is_dir()), here) / "quickstart"


@app.command()
def demo(
    directory: Annotated[Path | None, typer.Option("-f", "--filename", help="Manifests of the fleet.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Trace to replay (Mooncake, LMCache or Azure format).")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="Requests of the trace to replay.")] = 300,
    policy: Annotated[
        list[str] | None, typer.Option(help="Policies to compare, in order. Default: round_robin, kvfleet.")
    ] = None,
    rate: Annotated[
        float, typer.Option(min=0.01, max=100, help="Arrivals at this multiple of the trace's rate.")
    ] = 0.6,
    speed: Annotated[float, typer.Option(min=0.1, max=100, help="Seconds of the fleet per real second.")] = 5.0,
    json: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
    logs: Annotated[Path | None, typer.Option(help="Keep the processes' logs in this directory.")] = None,
) -> None:
    """A fleet on this machine, a real trace, two policies, one table. No Kubernetes, no GPU.

    The workers are simulated vLLM servers with the speed and power of the accelerators in the manifests; the router is
    the real one. Takes about a minute and leaves no process behind.

    Examples: `kvfleet demo` · `kvfleet demo --json out.json` · `kvfleet demo -f my-fleet/ --trace trace.jsonl --policy least_request --policy kvfleet`
    """
    from kvfleet import demo as demo_module
    from kvfleet.local import LocalFleetError
    from kvfleet_api.manifests import with_bundled
    from kvfleet_sim.traces import TraceError, at_rate, read_trace

    console = Console()
    directory = directory or quickstart_directory()
    trace = trace or directory.parent / "traces" / "mooncake_synthetic_300.jsonl"
    policies = policy or ["round_robin", "kvfleet"]
    check_strategies(policies)
    if json is not None and not json.parent.is_dir():
        raise UsageError(f"--json {json}: {json.parent} is not a directory: create it or choose another place")
    manifests = load_manifests([directory])
    objects = render_objects(manifests)
    if not manifests.routers:
        raise UsageError(f"{directory}: no FleetRouter among the manifests: add one (kind: FleetRouter)")
    try:
        rows = at_rate(read_trace(trace, limit=limit), rate)
    except TraceError as error:
        raise UsageError(str(error)) from error
    model = manifests.pools[0].spec.model.name
    span_s = rows[-1].arrival_s - rows[0].arrival_s
    console.print(
        f"[bold]{len(rows)} requests[/bold] of {trace.name}: {span_s:.0f} s at {rate:g}x the trace's rate, "
        f"{speed:g}x faster than real; fleet: {', '.join(f'{p.metadata.name} ({p.spec.replicas})' for p in manifests.pools)}"
    )
    try:
        results = asyncio.run(
            demo_module.run_policies(
                objects,
                with_bundled(manifests.profiles),
                rows,
                model=model,
                policies=policies,
                speed=speed,
                console=console,
                keep_logs=logs,
            )
        )
    except LocalFleetError as error:
        raise UsageError(str(error)) from error
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    demo_module.print_results(results, console)
    if json is not None:
        demo_module.write_json(results, json, trace=trace.name, rate=rate, speed=speed)
    failed = [outcome for result in results for outcome in result.outcomes if not outcome.ok]
    if failed:
        console.print(f"[red]{len(failed)} requests failed[/red], the first: {escaped(failed[0].error)}")
        raise typer.Exit(1)


app.command()(router)
app.command()(tokenizer)
app.command()(calibrate)
app.add_typer(energy, name="energy")


@app.command(context_settings=PASS_THROUGH)
def worker(context: typer.Context) -> None:
    """A simulated vLLM server: vLLM's HTTP API, metrics and KV events, with an accelerator's speed and power.

    Takes the arguments of `vllm serve`, and --profile, --speed, --seed. `kvfleet worker --help` lists them.

    Example: `kvfleet worker meta-llama/Llama-3.1-8B-Instruct --served-model-name llama-8b --port 8000 --profile nvidia-h100-80gb`
    """
    from kvfleet_sim.server import main as serve

    raise typer.Exit(serve(context.args))


@app.command()
def operator(
    namespace: Annotated[
        list[str] | None, typer.Option("-n", "--namespace", help="Namespace to watch; repeat. Default: all.")
    ] = None,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of /metrics, /healthz, /readyz.")] = 8081,
    lease_name: Annotated[str, typer.Option(help="Lease that one replica holds at a time.")] = "kvfleet-operator",
    lease_namespace: Annotated[str | None, typer.Option(help="Default: the pod's own, else `default`.")] = None,
    kubeconfig: Annotated[str | None, typer.Option(help="Outside a cluster: path of a kubeconfig.")] = None,
    context: Annotated[str | None, typer.Option(help="Context of the kubeconfig. Default: its current one.")] = None,
    resync_seconds: Annotated[float, typer.Option(min=1, help="Every object is looked at again this often.")] = 300.0,
    prometheus_url: Annotated[
        str | None, typer.Option(help="Where the autoscaler reads its signals. Default: from the routers themselves.")
    ] = None,
    prometheus_token_file: Annotated[
        Path | None, typer.Option(help="File with the bearer token for Prometheus, read anew each time.")
    ] = None,
    prometheus_ca_file: Annotated[
        Path | None, typer.Option(help="Certificates to trust at Prometheus instead of the system's.")
    ] = None,
    autoscaling_seconds: Annotated[float, typer.Option(min=1, help="Autoscaled pools are judged this often.")] = 15.0,
    gpu_budget: Annotated[
        int | None, typer.Option(min=0, help="GPUs that all autoscaled pools together may grow to.")
    ] = None,
    watt_budget: Annotated[
        float | None, typer.Option(min=0, help="Watts that all autoscaled pools together may grow to.")
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Reconcile ModelPools, RoutingPolicies, FleetRouters and AcceleratorProfiles in a cluster, and scale pools.

    Examples: `kvfleet operator` · `kvfleet operator -n inference --prometheus-url http://prometheus:9090`
    """
    import logging

    from kvfleet.scaling import prometheus_settings, scaler_options
    from kvfleet_operator.main import OperatorOptions, run_operator

    logging.basicConfig(level=checked_log_level(log_level), format=LOG_FORMAT)
    try:
        prometheus = prometheus_settings(prometheus_url, prometheus_token_file, prometheus_ca_file)
    except ValueError as error:
        raise UsageError(str(error)) from error
    options = OperatorOptions(
        namespaces=tuple(namespace or ()),
        scaling=scaler_options(autoscaling_seconds, gpu_budget, watt_budget),
        prometheus=prometheus,
        metrics_port=metrics_port,
        lease_name=lease_name,
        resync_s=resync_seconds,
        kubeconfig=kubeconfig,
        context=context,
    )
    if lease_namespace is not None:
        options = dataclasses.replace(options, lease_namespace=lease_namespace)
    raise typer.Exit(run_operator(options))


@app.command()
def simulate(
    filename: Files,
    trace: Annotated[
        str, typer.Option(help="Trace file (Mooncake, LMCache, Azure or ServeGen format), or `shared-prefix`.")
    ],
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="Policies to compare: strategies, `kvfleet:energy`, or `manifests` (as they are). Default: least_request, lmetric, kvfleet."
        ),
    ] = None,
    load: Annotated[
        list[float] | None, typer.Option(help="Share of the fleet's saturation rate; repeat. Default: 0.6, 0.8.")
    ] = None,
    capacity: Annotated[bool, typer.Option(help="Find each policy's SLO capacity.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, max=1_000_000, help="Requests to send.")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Repeat with so many draws of arrivals.")] = 1,
    model: Annotated[str | None, typer.Option(help="Model the requests name, where the fleet serves several.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Workers of each pool, instead of spec.replicas.")
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, max=64, help="Routers in front of the workers.")] = 1,
    share_milliseconds: Annotated[
        int | None,
        typer.Option(min=1, help="How often routers tell each other what they have in flight. Default: never."),
    ] = None,
    calibration_error: Annotated[
        float,
        typer.Option(
            min=0.01, max=100, help="Routers believe prefill so many times slower, decoding faster, than it is."
        ),
    ] = 1.0,
    kv_events: Annotated[
        bool | None,
        typer.Option("--kv-events/--no-kv-events", help="Engines report their caches. Default: as in the manifests."),
    ] = None,
    park_seconds: Annotated[
        float | None, typer.Option(min=1, help="Switch workers off after so long without work. Default: never.")
    ] = None,
    autoscale: Annotated[
        bool, typer.Option(help="Let the operator's autoscaler choose the number of workers, over --hours.")
    ] = False,
    hours: Annotated[float, typer.Option(min=0.01, max=336, help="With --autoscale: how long.")] = 24.0,
    startup_seconds: Annotated[
        float, typer.Option(min=0, max=7200, help="What a worker takes to start, with --autoscale and --park-seconds.")
    ] = 120.0,
    hpa_target: Annotated[
        list[int] | None,
        typer.Option(min=1, help="With --autoscale: requests in flight a worker for HPA's rules. Default: 8, 16, 32."),
    ] = None,
    answer_tokens: Annotated[
        float,
        typer.Option(min=1, max=8192, help="With --autoscale: median length of the answers, which rates do not tell."),
    ] = 250.0,
    jobs: Annotated[int, typer.Option("-j", "--jobs", min=1, max=1024, help="Processes.")] = 1,
    json: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw TTFT and goodput to this file (.png, .svg, .pdf).")
    ] = None,
) -> None:
    """What would a policy do to this fleet? Simulated workers, the router's own core, virtual time: an hour in seconds.

    Examples: `kvfleet simulate -f examples/bench8 --trace examples/traces/mooncake_synthetic_300.jsonl` · `kvfleet simulate -f examples/bench8 --trace shared-prefix --policy lmetric --policy kvfleet:energy --load 0.3 --seeds 3 --json out.json --plot out.png` · `kvfleet simulate -f my-fleet/ --trace trace.jsonl --policy manifests --capacity` · `kvfleet simulate -f my-fleet/ --trace servegen_client_rates.tar.gz --autoscale --hours 24 --load 0.4`
    """
    from kvfleet import simulate as command
    from kvfleet import simulate_plot
    from kvfleet_sim.fleet import Options
    from kvfleet_sim.variants import with_policy
    from kvfleet_sim.workload import open_load

    console = Console()
    loads = load if load or capacity else [0.6, 0.8]
    policies = list(dict.fromkeys(policy or ["least_request", "lmetric", "kvfleet"]))
    manifests = load_manifests(filename)
    scaling = {pool.metadata.name: pool.spec.autoscaling for pool in manifests.pools if pool.spec.autoscaling}
    if autoscale and workers is None and scaling:
        workers = max(spec.max_replicas for spec in scaling.values())
    try:
        config, model = command.fleet_of(compile_fleet_config(manifests), manifests, model, workers)
        for name in policies:
            with_policy(config, name)
        command.check(loads or [], json)
        if plot is not None:
            simulate_plot.check(plot)
        source = open_load(trace, limit)
        options = Options(
            replicas=replicas,
            share_s=share_milliseconds / 1000 if share_milliseconds else None,
            kv_events=kv_events,
            calibration_error=calibration_error,
        )
        experiment = command.Experiment(config, model, source, options)
        if autoscale:
            from kvfleet import simulate_autoscale

            simulate_autoscale.command(
                experiment,
                trace=trace,
                load=(load or [0.4])[0],
                hours=hours,
                hpa_targets=hpa_target or [8, 16, 32],
                startup_s=startup_seconds,
                answer_tokens=answer_tokens,
                jobs=jobs,
                console=console,
                json=json,
                specs=scaling,
            )
            return
        if park_seconds is not None:
            experiment = command.with_parking(experiment, park_seconds, startup_seconds)
        report = command.run_experiment(
            experiment,
            policies=policies,
            loads=loads or [],
            seeds=seeds,
            capacity=policies if capacity else [],
            jobs=jobs,
            console=Console(stderr=True),
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    command.print_report(report, console)
    if json is not None:
        command.write_json(experiment, report, json, trace=trace)
    if plot is not None:
        simulate_plot.draw(report, plot, title=f"{Path(trace).name}, {experiment.worker_count} workers")


@app.command()
def render(filename: Files) -> None:
    """Print exactly the objects the operator would apply for these manifests. Needs no cluster.

    Examples: `kvfleet render -f examples/quickstart` · `kvfleet render -f my-fleet/ | kubectl diff -f -`
    """
    import yaml

    for obj in render_objects(load_manifests(filename)):
        typer.echo("---\n" + yaml.safe_dump(obj, sort_keys=False, width=120), nl=False)


@app.command()
def crds(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write one file per kind to this directory.")
    ] = None,
) -> None:
    """Print the CustomResourceDefinitions.

    Examples: `kvfleet crds | kubectl apply --server-side -f -` · `kvfleet crds -o crds/`
    """
    from kvfleet_api.schema import all_crds, write

    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write(output)
        return
    for text in all_crds().values():
        typer.echo("---\n" + text, nl=False)


@app.command()
def explain(
    decision: Annotated[
        str | None,
        typer.Argument(help="Decision id (header x-kvfleet-decision), or `pool`. Default: the latest decision."),
    ] = None,
    name: Annotated[str | None, typer.Argument(help="With `pool`: the ModelPool.")] = None,
    body: Annotated[
        Path | None,
        typer.Option(help="A request's JSON body: what would the router do with it now? Nothing is sent to a worker."),
    ] = None,
    path: Annotated[str, typer.Option(help="With --body: the endpoint it is for.")] = "/v1/chat/completions",
    header: Annotated[
        list[str] | None, typer.Option("-H", "--header", help="With --body: a header of the request, `name: value`.")
    ] = None,
    url: Annotated[str, typer.Option(help="Admin address of the router.")] = "http://127.0.0.1:9090",
    limit: Annotated[int, typer.Option("-n", min=1, max=100, help="How many of the latest.")] = 1,
    namespace: Annotated[str | None, typer.Option(help="Of the pool. Default: the kubeconfig's.")] = None,
    kubeconfig: Annotated[
        Path | None,
        typer.Option(help="With `pool`: where the cluster is. Default: KUBECONFIG, ~/.kube/config, the pod's."),
    ] = None,
    context: Annotated[str | None, typer.Option(help="Context of the kubeconfig. Default: its current one.")] = None,
) -> None:
    """Why did this request go there? Candidates, what each would have cost, prediction and outcome. Or, with `pool NAME`:
    why has this pool so many workers?

    Examples: `kvfleet explain` · `kvfleet explain -n 5` · `kvfleet explain --body request.json -H "x-session-id: a"` · `kvfleet explain 1f3a-27 --url http://router:9090` · `kvfleet explain pool llama-8b --namespace prod`
    """
    import httpx

    from kvfleet.explain import dry_run, explain_decision

    if body is not None:
        if decision is not None or name is not None:
            raise UsageError("--body explains a request that was not sent: leave out the decision")
        try:
            Console().print(explain_decision(dry_run(url, body, path, header or [])))
        except ValueError as error:
            raise UsageError(str(error)) from error
        return
    if decision == "pool":
        from kvfleet.explain_pool import PoolError, explain_pool, read_pool

        if not name:
            raise UsageError("which pool? Give its name: kvfleet explain pool NAME")
        try:
            pool = asyncio.run(read_pool(name, namespace, kubeconfig, context))
        except PoolError as error:
            raise UsageError(str(error)) from error
        Console().print(explain_pool(pool))
        return
    if name is not None:
        raise UsageError(f"{name}: only `kvfleet explain pool NAME` takes a name: leave it out")
    asked = f"/decisions/{decision}" if decision else f"/decisions?limit={limit}"
    try:
        answer = httpx.get(url.rstrip("/") + asked, timeout=10.0)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UsageError(f"--url {url}: {error}: give the router's admin address (default port 9090)") from error
    if answer.status_code == 404:
        raise UsageError(
            f"{decision}: no such decision: only the latest are kept; list them with `kvfleet explain -n 20`"
        )
    if answer.status_code != 200:
        raise UsageError(f"{url}{asked} answered {answer.status_code}: is this a router's admin port?")
    found = answer.json()
    console = Console()
    decisions = [found] if decision else found["decisions"]
    if not decisions:
        console.print("No decisions yet: send a request first.")
    for item in decisions:
        console.print(explain_decision(item))


if __name__ == "__main__":
    main()
