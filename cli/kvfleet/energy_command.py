"""`kvfleet energy report` and `kvfleet calibrate`: thin shells around energy_report.py and calibrate.py."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvfleet.inputs import UsageError

energy = typer.Typer(help="Joules: whose they were.", no_args_is_help=True)


@energy.command()
def report(
    url: Annotated[list[str] | None, typer.Option(help="A router's admin address; repeat for several.")] = None,
    prometheus: Annotated[str | None, typer.Option(help="A Prometheus that scrapes the routers, instead.")] = None,
    since: Annotated[str, typer.Option(help="With --prometheus: how far back, as in 30m, 24h, 7d.")] = "24h",
    until: Annotated[str | None, typer.Option(help="With --prometheus: RFC 3339 or Unix time. Default: now.")] = None,
    by: Annotated[str, typer.Option(help="Labels to add up by: pool, tenant, model.")] = "tenant,model",
    csv: Annotated[
        Path | None, typer.Option(help="Write CSV to this file instead of a table; `-`: standard output.")
    ] = None,
) -> None:
    """Whose joules they were: prefill, decode, their share of steps, and idling, which is nobody's.

    Examples: `kvfleet energy report` · `kvfleet energy report --prometheus http://prometheus:9090 --since 7d --by tenant --csv week.csv`
    """
    from kvfleet import energy_report as command

    try:
        labels = command.check_by(by)
        if prometheus is not None:
            joules, grams, saved, lost = (
                command.from_prometheus(prometheus, metric, since, until)
                for metric in (command.JOULES, command.GRAMS, command.SAVED, command.LOST)
            )
            savings = command.savings(saved, lost, None)
        else:
            urls = url or ["http://127.0.0.1:9090"]
            joules, grams, saved, lost, errors = (
                command.from_routers(urls, metric)
                for metric in (command.JOULES, command.GRAMS, command.SAVED, command.LOST, command.SAVED_ERROR)
            )
            savings = command.savings(saved, lost, errors)
        lines = command.grouped(joules, grams, labels)
    except command.ReportError as error:
        raise UsageError(str(error)) from error
    if not lines:
        raise UsageError("no joules are booked there: set spec.telemetry of the FleetRouter")
    if csv is None:
        console = Console()
        command.print_table(lines, labels, console)
        if savings is not None:
            console.print(command.in_words(savings), highlight=False)
    elif str(csv) == "-":
        typer.echo(command.as_csv(lines, labels), nl=False)
    else:
        csv.write_text(command.as_csv(lines, labels))


def calibrate(
    url: Annotated[str, typer.Option(help="The engine, http://host:port. It should get no other requests meanwhile.")],
    profile: Annotated[
        str, typer.Option(help="Bundled profile of its accelerator: what is not measured is taken from it.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The AcceleratorProfile is written here.")],
    dcgm_url: Annotated[
        str | None, typer.Option(help="DCGM exporter of its devices, http://host:9400/metrics.")
    ] = None,
    pod: Annotated[str | None, typer.Option(help="With --dcgm-url: only devices with this `pod` label.")] = None,
    nvml: Annotated[list[int] | None, typer.Option(help="Devices of this machine to read by NVML; repeat.")] = None,
    seconds: Annotated[float, typer.Option(min=5, max=86400, help="How long to measure.")] = 900.0,
    max_sequences: Annotated[int, typer.Option(min=2, max=1024, help="Largest batch.")] = 128,
    name: Annotated[str | None, typer.Option(help="Name of the profile. Default: that of --profile.")] = None,
    model: Annotated[str | None, typer.Option(help="The row's model. Default: what the engine serves.")] = None,
    tensor: Annotated[int, typer.Option(min=1, max=64, help="Devices of the engine.")] = 1,
    kv_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens its KV cache holds.")] = None,
    conditions: Annotated[str, typer.Option(help="What else should be known: versions, power limit, host.")] = "",
) -> None:
    """Measure a running engine: step and prefill times, joules a step, a token, a prompt token, and idle watts.

    Examples: `kvfleet calibrate --url http://10.0.0.7:8000 --dcgm-url http://10.0.0.7:9400/metrics --profile nvidia-h100-80gb -o my-h100.yaml`
    """
    from kvfleet import calibrate as command
    from kvfleet_api.manifests import bundled_profiles

    console = Console(stderr=True)
    base = {found.metadata.name: found for found in bundled_profiles()}.get(profile)
    if base is None:
        known = ", ".join(sorted(found.metadata.name for found in bundled_profiles()))
        raise UsageError(f"--profile {profile}: not bundled: use one of {known}")
    if not output.parent.is_dir():
        raise UsageError(f"--output {output}: {output.parent} is not a directory: create it or choose another place")
    try:
        runs, fitted, served = asyncio.run(
            command.calibrate(
                url,
                seconds=seconds,
                max_sequences=max_sequences,
                dcgm_url=dcgm_url,
                pod=pod,
                nvml=nvml or [],
                say=lambda line: console.print(line, highlight=False),
            )
        )
        document = command.profile(
            runs,
            fitted,
            base,
            name=name or profile,
            model=model or served["id"],
            tensor=tensor,
            kv_tokens=kv_tokens,
            conditions=conditions or f"{seconds:g} s on {served['id']}",
        )
    except command.CalibrationError as error:
        raise UsageError(str(error)) from error
    command.write(document, output)
    console.print(command.errors(fitted).replace(", ", "\n"), highlight=False)
