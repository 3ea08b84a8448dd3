"""The way of a new user: an empty cluster, the chart, the example, the first token."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import openai
import pytest
from harness.sentences import Story, Then
from harness.settings import E2E_DIR
from support.installation import Installation

QUICKSTART = E2E_DIR.parent / "examples/quickstart"
POOLS = ("llama-8b-h100", "llama-8b-a100")


@pytest.fixture
def empty_cluster(installation: Installation) -> Iterator[Installation]:
    """Without kvfleet, whatever ran before."""
    installation.remove()
    yield installation


def first_token(client: openai.OpenAI) -> tuple[float, list[str], int]:
    """When it came, all pieces of the answer, and what its usage says."""
    came_at, pieces, counted = 0.0, [], 0
    stream = client.chat.completions.create(
        model="llama-8b",
        messages=[{"role": "user", "content": "What is a KV cache?"}],
        max_tokens=32,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    for chunk in stream:
        if text := "".join(choice.delta.content or "" for choice in chunk.choices):
            came_at = came_at or time.monotonic()
            pieces.append(text)
        counted = chunk.usage.completion_tokens if chunk.usage else counted
    return came_at, pieces, counted


def test_from_an_empty_cluster_to_the_first_token(
    empty_cluster: Installation, then: Then, story: Story, tells: Callable[[str], None]
) -> None:
    with story.tells("when the chart is installed"):
        empty_cluster.install()
    applied_at = time.monotonic()
    with story.tells("when examples/quickstart is applied"):
        story.cluster.run("kubectl", "apply", f"--namespace={story.kube.namespace}", f"--filename={QUICKSTART}")
    for pool in POOLS:
        then.ready("ModelPool", pool, within_s=90)
    then.ready("FleetRouter", "router", within_s=60).ready("RoutingPolicy", "llama-8b")
    ready_at = time.monotonic()

    client = openai.OpenAI(base_url=story.url("router", path="/v1"), api_key="none", max_retries=0)
    with client, story.tells("then a chat completion streams through the router's Service"):
        came_at, pieces, counted = first_token(client)
    assert len(pieces) == counted == 32
    tells(
        f"everything Ready {ready_at - applied_at:.1f} s after the apply, first token after {came_at - applied_at:.1f} s"
    )
