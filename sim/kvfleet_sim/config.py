"""The command line of `kvfleet worker`: the arguments of `vllm serve`, and the simulator's own. Pure, but for reading files.

`parse(argv)` gives a `WorkerConfig` with everything resolved. Arguments of vLLM that change nothing a client, a router or
Prometheus could see are accepted and named in `ignored`; underscores count as dashes, as in vLLM.
"""

from __future__ import annotations

import argparse
import json
import os
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from kvfleet_api.acceleratorprofile import AcceleratorProfile
from kvfleet_api.cost import CostModel
from kvfleet_api.manifests import ManifestError, bundled_profiles, load
from kvfleet_api.modelpool import ModelSpec
from kvfleet_api.resolve import CostError, integer_argument, resolve_cost

DEFAULT_PROFILE: Final = "nvidia-h100-80gb"
DEFAULT_MODEL: Final = "meta-llama/Llama-3.1-8B-Instruct"
MAX_MODEL_LEN: Final = 131_072
"""The default where the KV cache holds more: a simulated model has no config.json that would tell."""


class ConfigError(ValueError):
    """An argument that cannot be used; the message names it and the remedy."""


@dataclass(frozen=True, slots=True)
class KvEventsConfig:
    """vLLM's --kv-events-config."""

    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    topic: str = ""
    buffer_steps: int = 10_000
    hwm: int = 100_000
    max_queue_size: int = 100_000


@dataclass(frozen=True, slots=True)
class Adapter:
    name: str
    path: str


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files, as vLLM takes them."""

    certificate: Path
    key: Path | None = None
    """None: in the same file."""
    client_authorities: Path | None = None
    client_certificates: int = 0
    """0: not asked for, 1: looked at, 2: demanded."""

    def context(self) -> ssl.SSLContext:
        """Raises OSError where a file cannot be used."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.certificate, self.key)
            if self.client_authorities is not None:
                context.load_verify_locations(self.client_authorities)
        except OSError as error:  # ssl.SSLError is one
            files = ", ".join(str(file) for file in (self.certificate, self.key, self.client_authorities) if file)
            raise OSError(f"--ssl-certfile and its like: {files}: {error}: give readable PEM files") from error
        context.verify_mode = ssl.VerifyMode(self.client_certificates)
        return context


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    model: str
    served_names: tuple[str, ...]
    cost: CostModel
    profile: AcceleratorProfile
    gpus: int = 1
    host: str = "0.0.0.0"
    port: int = 8000
    max_model_len: int = MAX_MODEL_LEN
    block_tokens: int = 16
    gpu_memory_utilization: float = 0.9
    prefix_caching: bool = True
    kv_events: KvEventsConfig | None = None
    prompt_tokens_details: bool = False
    request_id_headers: bool = False
    server_load_tracking: bool = False
    auto_tool_choice: bool = False
    lora: bool = False
    adapters: tuple[Adapter, ...] = ()
    max_loras: int = 1
    by_priority: bool = False
    kv_transfer: bool = False
    kv_transfer_s_per_token: float = 5e-6
    shutdown_timeout_s: float = 0.0
    stream_interval: int = 1
    api_keys: tuple[str, ...] = ()
    tls: TlsFiles | None = None
    """Serve HTTPS."""
    tokenizer: Path | None = None
    speed: float = 1.0
    seed: int = 0
    startup_s: float = 0.0
    dcgm_port: int | None = None
    pod: str = ""
    namespace: str = ""
    container: str = ""
    ignored: tuple[str, ...] = ()

    @property
    def kv_blocks(self) -> int:
        return self.cost.kv_tokens // self.block_tokens


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvfleet worker",
        description="A simulated vLLM server: `vllm serve` with an accelerator's speed and power, and no accelerator.",
        epilog="Any other argument of vllm serve is accepted and ignored, with a warning.",
        allow_abbrev=False,
    )
    vllm = parser.add_argument_group("arguments of vllm serve")
    vllm.add_argument("model", nargs="?", default=None, help=f"default: {DEFAULT_MODEL}")
    vllm.add_argument("--model", dest="model_option", metavar="MODEL", help="the model, as an option")
    vllm.add_argument("--served-model-name", nargs="+", metavar="NAME", help="names clients send; default: the model")
    vllm.add_argument("--host", default="0.0.0.0")
    vllm.add_argument("--port", type=int, default=8000, help="0: a free one")
    vllm.add_argument("--max-model-len", metavar="TOKENS", help="longest prompt plus output; 8k and 8K are understood")
    vllm.add_argument("--max-num-seqs", metavar="N")
    vllm.add_argument("--max-num-batched-tokens", metavar="N")
    vllm.add_argument("--block-size", type=int, default=16, metavar="TOKENS")
    vllm.add_argument("--num-gpu-blocks-override", type=int, metavar="N")
    vllm.add_argument("--gpu-memory-utilization", type=float, default=0.9, metavar="SHARE")
    vllm.add_argument("--tensor-parallel-size", "-tp", type=int, default=1, metavar="N")
    vllm.add_argument("--pipeline-parallel-size", "-pp", type=int, default=1, metavar="N")
    vllm.add_argument("--data-parallel-size", "-dp", type=int, default=1, metavar="N", help="only 1")
    vllm.add_argument("--data-parallel-rank", "-dpn", type=int, default=0, metavar="N", help="only 0")
    vllm.add_argument(
        "--quantization", "-q", metavar="METHOD", help="tells the weights' size where no profile row does"
    )
    vllm.add_argument("--revision", metavar="REVISION", help="accepted")
    vllm.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True)
    vllm.add_argument("--kv-events-config", metavar="JSON")
    vllm.add_argument("--enable-prompt-tokens-details", action="store_true")
    vllm.add_argument("--enable-request-id-headers", action="store_true")
    vllm.add_argument("--enable-server-load-tracking", action="store_true")
    vllm.add_argument("--enable-auto-tool-choice", action="store_true")
    vllm.add_argument("--tool-call-parser", metavar="NAME")
    vllm.add_argument("--enable-lora", action=argparse.BooleanOptionalAction, default=False)
    vllm.add_argument("--lora-modules", nargs="+", metavar="NAME=PATH", help="adapters to begin with")
    vllm.add_argument("--max-loras", type=int, default=1, metavar="N")
    vllm.add_argument("--scheduling-policy", choices=("fcfs", "priority"), default="fcfs")
    vllm.add_argument("--kv-transfer-config", metavar="JSON", help="any connector: prefill and decode may be apart")
    vllm.add_argument("--shutdown-timeout", type=float, default=0.0, metavar="SECONDS", help="0: abort on SIGTERM")
    vllm.add_argument("--stream-interval", type=int, default=1, metavar="TOKENS")
    vllm.add_argument("--api-key", nargs="+", metavar="KEY", help="default: VLLM_API_KEY")
    vllm.add_argument("--ssl-certfile", type=Path, metavar="FILE", help="serve HTTPS with this certificate")
    vllm.add_argument("--ssl-keyfile", type=Path, metavar="FILE", help="its key; default: in the same file")
    vllm.add_argument("--ssl-ca-certs", type=Path, metavar="FILE", help="authorities of clients' certificates")
    vllm.add_argument("--ssl-cert-reqs", type=int, choices=(0, 1, 2), default=0, help="2: clients must show one")
    vllm.add_argument("--enable-ssl-refresh", action="store_true", help="accepted: files are read at the start alone")
    vllm.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json; default: four bytes are a token")
    own = parser.add_argument_group("arguments of the simulator")
    own.add_argument("--profile", metavar="NAME|FILE", help=f"AcceleratorProfile; default: {DEFAULT_PROFILE}")
    own.add_argument("--speed", type=float, default=1.0, metavar="X", help="virtual seconds per real second")
    own.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, other words")
    own.add_argument("--startup-seconds", type=float, default=0.0, help="virtual time to load the model before serving")
    own.add_argument("--kv-tokens", type=int, metavar="N", help="KV cache size; default: the profile's")
    own.add_argument("--kv-transfer-microseconds", type=float, default=5.0, metavar="US", help="per token received")
    own.add_argument("--dcgm-port", type=int, metavar="PORT", help="DCGM metrics at /metrics of this port as well")
    own.add_argument("--pod", default=os.environ.get("POD_NAME", ""), help="label of the DCGM metrics")
    own.add_argument("--namespace", default=os.environ.get("POD_NAMESPACE", ""), help="label of the DCGM metrics")
    own.add_argument("--container", default="vllm", help="label of the DCGM metrics")
    return parser


def parse(argv: Sequence[str]) -> WorkerConfig:
    """The configuration that a command line stands for. Raises ConfigError; SystemExit for --help and bad syntax."""
    args, ignored = build_parser().parse_known_args([_dashed(arg) for arg in argv])
    if args.data_parallel_size != 1 or args.data_parallel_rank != 0:
        raise ConfigError("--data-parallel-size and --data-parallel-rank: a simulated worker is one rank; run several")
    model = args.model_option or args.model or DEFAULT_MODEL
    profile = _profile(args.profile or DEFAULT_PROFILE)
    config = WorkerConfig(
        model=model,
        served_names=tuple(args.served_model_name or [model]),
        cost=_cost(profile, model, args),
        profile=profile,
        gpus=args.tensor_parallel_size * args.pipeline_parallel_size,
        host=args.host,
        port=args.port,
        block_tokens=args.block_size,
        gpu_memory_utilization=args.gpu_memory_utilization,
        prefix_caching=args.enable_prefix_caching,
        kv_events=_kv_events(args.kv_events_config),
        prompt_tokens_details=args.enable_prompt_tokens_details,
        request_id_headers=args.enable_request_id_headers,
        server_load_tracking=args.enable_server_load_tracking,
        auto_tool_choice=args.enable_auto_tool_choice and args.tool_call_parser is not None,
        lora=args.enable_lora,
        adapters=tuple(_adapter(text) for text in args.lora_modules or ()),
        max_loras=args.max_loras,
        by_priority=args.scheduling_policy == "priority",
        kv_transfer=_kv_transfer(args.kv_transfer_config),
        kv_transfer_s_per_token=args.kv_transfer_microseconds * 1e-6,
        shutdown_timeout_s=args.shutdown_timeout,
        stream_interval=args.stream_interval,
        tls=_tls(args),
        api_keys=tuple(args.api_key or filter(None, [os.environ.get("VLLM_API_KEY")])),
        tokenizer=Path(args.tokenizer) if args.tokenizer else None,
        speed=args.speed,
        seed=args.seed,
        startup_s=args.startup_seconds,
        dcgm_port=args.dcgm_port,
        pod=args.pod,
        namespace=args.namespace,
        container=args.container,
        ignored=tuple(ignored),
    )
    _check_ranges(config, args)
    return replace(config, max_model_len=_max_model_len(config, args.max_model_len))


def _tls(args: argparse.Namespace) -> TlsFiles | None:
    if args.ssl_certfile is None:
        if args.ssl_keyfile is not None or args.ssl_ca_certs is not None:
            raise ConfigError("--ssl-keyfile and --ssl-ca-certs need --ssl-certfile: add it, or leave them out")
        return None
    return TlsFiles(args.ssl_certfile, args.ssl_keyfile, args.ssl_ca_certs, args.ssl_cert_reqs)


def _dashed(arg: str) -> str:
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value if arg.startswith("--") else arg


def _check_ranges(config: WorkerConfig, args: argparse.Namespace) -> None:
    at_least = {
        "--block-size": (config.block_tokens, 1),
        "--max-loras": (config.max_loras, 1),
        "--stream-interval": (config.stream_interval, 1),
        "--tensor-parallel-size": (args.tensor_parallel_size, 1),
        "--pipeline-parallel-size": (args.pipeline_parallel_size, 1),
        "--shutdown-timeout": (config.shutdown_timeout_s, 0),
        "--startup-seconds": (config.startup_s, 0),
        "--kv-transfer-microseconds": (config.kv_transfer_s_per_token, 0),
        "--port": (config.port, 0),
        "--kv-tokens": (config.cost.kv_tokens, 2 * config.block_tokens),
    }
    for option, (value, least) in at_least.items():
        if not value >= least:
            raise ConfigError(f"{option} must be at least {least}, got {value}")
    if not 0 < config.speed <= 1e6:
        raise ConfigError(f"--speed must be above 0 (and at most 1000000), got {config.speed:g}")
    if config.adapters and not config.lora:
        raise ConfigError("--lora-modules needs --enable-lora")
    if config.cost.max_step_tokens < config.cost.max_sequences:
        raise ConfigError(
            f"max_num_batched_tokens ({config.cost.max_step_tokens}) must be greater than or equal to "
            f"max_num_seqs ({config.cost.max_sequences}): raise --max-num-batched-tokens or lower --max-num-seqs"
        )


def _max_model_len(config: WorkerConfig, text: str | None) -> int:
    capacity = (config.kv_blocks - 1) * config.block_tokens
    if text is None or text in ("auto", "-1"):
        return min(MAX_MODEL_LEN, capacity)
    length = integer_argument(["--max-model-len", text], "max-model-len")
    if length is None:
        raise ConfigError(f"--max-model-len must be a number of tokens such as 8192 or 8k, got {text!r}")
    if length > capacity:
        raise ConfigError(
            f"--max-model-len {length} is more than the KV cache holds ({capacity} tokens): lower it, or raise --kv-tokens"
        )
    return length


def _cost(profile: AcceleratorProfile, model: str, args: argparse.Namespace) -> CostModel:
    engine_args = [
        part
        for option in ("quantization", "max-num-seqs", "max-num-batched-tokens")
        if (value := getattr(args, option.replace("-", "_"))) is not None
        for part in (f"--{option}", value)
    ]
    for option in ("max-num-seqs", "max-num-batched-tokens"):
        if f"--{option}" in engine_args and integer_argument(engine_args, option) is None:
            raise ConfigError(
                f"--{option} must be a whole number above 0, got {getattr(args, option.replace('-', '_'))!r}"
            )
    parallel = (max(1, args.tensor_parallel_size), max(1, args.pipeline_parallel_size))
    cost = _resolved(profile, [model, *(args.served_model_name or []), DEFAULT_MODEL], parallel, engine_args)
    if args.kv_tokens is not None:
        return replace(cost, kv_tokens=args.kv_tokens)
    if args.num_gpu_blocks_override is not None:
        return replace(cost, kv_tokens=args.num_gpu_blocks_override * args.block_size)
    return cost


def _resolved(
    profile: AcceleratorProfile, models: list[str], parallel: tuple[int, int], engine_args: list[str]
) -> CostModel:
    """The cost of the first of these models of which the profile can tell one."""
    problem: Exception | None = None
    for model in models:
        try:
            spec = ModelSpec(name="model", uri=model)
            return resolve_cost(profile.spec, spec, tensor=parallel[0], pipeline=parallel[1], args=engine_args)
        except CostError as error:
            if error.field != "model.parametersMillions":
                raise ConfigError(f"{model} on {profile.metadata.name}: {error}") from None
            problem = error
    raise ConfigError(f"no cost model: {problem}")


def _profile(text: str) -> AcceleratorProfile:
    for profile in bundled_profiles():
        if profile.metadata.name == text:
            return profile
    if not Path(text).exists():
        names = ", ".join(profile.metadata.name for profile in bundled_profiles())
        raise ConfigError(f"--profile {text!r} is neither a file nor one of: {names}")
    try:
        profiles = load([text]).profiles
    except ManifestError as error:
        raise ConfigError(f"--profile: {error}") from None
    if len(profiles) != 1:
        raise ConfigError(f"--profile {text}: holds {len(profiles)} AcceleratorProfiles, must hold one")
    return profiles[0]


def _kv_events(text: str | None) -> KvEventsConfig | None:
    if text is None:
        return None
    try:
        given = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--kv-events-config is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise ConfigError("--kv-events-config must be a JSON object")
    enabled, publisher = given.pop("enable_kv_cache_events", False), given.pop("publisher", None)
    if publisher not in (None, "zmq", "null"):
        raise ConfigError(f'--kv-events-config: publisher must be "zmq" or "null", got {publisher!r}')
    kinds: dict[str, Any] = {
        "endpoint": str,
        "replay_endpoint": str | None,
        "topic": str,
        "buffer_steps": int,
        "hwm": int,
        "max_queue_size": int,
    }
    for key, value in given.items():
        if key not in kinds:
            raise ConfigError(f"--kv-events-config: unknown field {key!r}; known: {', '.join(kinds)}")
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            raise ConfigError(f"--kv-events-config: {key} has the wrong type, got {value!r}")
        if isinstance(value, int) and value < 1:
            raise ConfigError(f"--kv-events-config: {key} must be at least 1, got {value}")
    return KvEventsConfig(**given) if enabled and publisher != "null" else None


def _kv_transfer(text: str | None) -> bool:
    try:
        given = {} if text is None else json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--kv-transfer-config is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise ConfigError("--kv-transfer-config must be a JSON object")
    return given.get("kv_connector") is not None


def _adapter(text: str) -> Adapter:
    try:
        given = (
            json.loads(text) if text.startswith("{") else dict(zip(("name", "path"), text.split("=", 1), strict=True))
        )
        return Adapter(str(given["name"]), str(given["path"]))
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f'--lora-modules {text!r}: write NAME=PATH or {{"name": …, "path": …}}') from None
