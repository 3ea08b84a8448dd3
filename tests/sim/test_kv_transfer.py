"""Prefill here, decode there: kv_transfer_params as a router passes them from one worker to the other."""

from __future__ import annotations

from sim_client import call, serving

ARGS = ("llama-8b", "--enable-prompt-tokens-details", "--kv-transfer-config", '{"kv_connector": "NixlConnector"}')
MESSAGES = [{"role": "user", "content": "x" * 4000}]
TO_PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}


async def test_the_decoding_worker_computes_the_last_token_only() -> None:
    async with serving(*ARGS) as prefill, serving(*ARGS, "--kv-transfer-microseconds", "100") as decode:
        body = {"messages": MESSAGES, "max_tokens": 1, "kv_transfer_params": TO_PREFILL}
        handed = (await call(prefill, "POST", "/v1/chat/completions", body)).json["kv_transfer_params"]
        assert handed["do_remote_prefill"] is True
        body = {"messages": MESSAGES, "max_tokens": 20, "kv_transfer_params": handed}
        answer = (await call(decode, "POST", "/v1/chat/completions", body)).json
        meter, stats = decode.worker.engine.meter, decode.worker.engine.stats
        prompt = answer["usage"]["prompt_tokens"]
        assert answer["usage"]["completion_tokens"] == 20
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == prompt - 1
        assert meter.prefill_tokens == 1
        assert prefill.worker.engine.meter.prefill_tokens == prompt
        assert (stats.prefix_hits, stats.external_hits) == (0, prompt - 1)
        metrics = (await call(decode, "GET", "/metrics")).body.decode()
        assert f'source="external_kv_transfer"}} {prompt - 1}.0' in metrics
        # What was received is cached for others like what was computed.
        again = (await call(decode, "POST", "/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1})).json
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == (prompt - 1) // 16 * 16
        assert decode.worker.engine.cache.free == decode.worker.engine.cache.capacity


async def test_without_a_connector_the_parameters_mean_nothing() -> None:
    async with serving("llama-8b") as server:
        params = {"do_remote_prefill": True, "do_remote_decode": True}
        body = {"messages": MESSAGES, "max_tokens": 2, "kv_transfer_params": params}
        answer = (await call(server, "POST", "/v1/chat/completions", body)).json
        assert answer["kv_transfer_params"] is None
        assert server.worker.engine.meter.prefill_tokens == answer["usage"]["prompt_tokens"]
