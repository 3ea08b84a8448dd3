"""What the command line says to the autoscaler."""

from __future__ import annotations

from pathlib import Path

from kvfleet_operator.autoscale.budget import Budget
from kvfleet_operator.autoscale.readers.prometheus import PrometheusSettings
from kvfleet_operator.scaling.loop import ScalerOptions

WAKE_S = 2.0


def prometheus_settings(url: str | None, token_file: Path | None, ca_file: Path | None) -> PrometheusSettings | None:
    """None: without Prometheus. Raises ValueError."""
    if url is None:
        for option, value in (("--prometheus-token-file", token_file), ("--prometheus-ca-file", ca_file)):
            if value is not None:
                raise ValueError(f"{option} says nothing without --prometheus-url: give both")
        return None
    if ca_file is not None and not ca_file.is_file():
        raise ValueError(f"--prometheus-ca-file {ca_file}: there is no such file: give a PEM file of certificates")
    return PrometheusSettings(url, token_file=token_file, ca_file=ca_file)


def scaler_options(period_s: float, gpus: int | None, watts: float | None) -> ScalerOptions:
    return ScalerOptions(period_s=period_s, wake_s=min(WAKE_S, period_s), budget=Budget(gpus, watts))
