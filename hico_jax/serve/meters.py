"""What the engine did, for Prometheus.

In: an engine. Out: the text that `/metrics` answers.
Next: hico_jax/serve/app.py
"""

from __future__ import annotations

import resource
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from hico_jax.serve.engine import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Meters:
    """Histograms that the routes fill, and the engine's own counts."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.registry = CollectorRegistry()
        make = lambda name, help: Histogram(name, help, buckets=SECONDS, registry=self.registry)
        self.first_token = make(
            "hico_first_token_seconds", "From a request's arrival at the engine to its first token."
        )
        self.whole = make("hico_request_seconds", "From a request's arrival at the engine to its last token.")
        self.registry.register(self)  # type: ignore[arg-type]

    def collect(self) -> Iterator[Metric]:
        engine, counts = self.engine, self.engine.counts
        ended = CounterMetricFamily("hico_requests", "Requests by how they ended.", labels=["reason"])
        for reason in ("stop", "length", "cancelled", "deadline", "error", "refused"):
            ended.add_metric([reason], counts.requests[reason])
        yield ended
        for name, value, help in (
            ("hico_prompt_tokens", counts.prompt_tokens, "Tokens of prompts, visual ones included."),
            ("hico_reused_tokens", counts.reused_tokens, "Tokens of prompts that did not run again."),
            ("hico_new_tokens", counts.new_tokens, "Tokens said."),
            ("hico_decode_steps", counts.steps, "Steps of decoding."),
            ("hico_prefill_pieces", counts.pieces, "Pieces of prompts run."),
        ):
            yield CounterMetricFamily(name, help, value=value)
        for name, value, help in (
            ("hico_waiting", len(engine.waiting), "Requests that wait for a lane."),
            ("hico_filling", len(engine.filling), "Requests whose prompt runs."),
            ("hico_speaking", len(engine.speaking), "Requests that are being answered."),
            ("hico_lane_bytes", sum(p.num_bytes for p in engine.pools), "Keys and values on the device."),
            (
                "hico_peak_rss_bytes",
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "Most memory on the host.",
            ),
        ):
            yield GaugeMetricFamily(name, help, value=value)

    def render(self) -> tuple[bytes, str]:
        """The text and its type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
