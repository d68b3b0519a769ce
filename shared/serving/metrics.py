"""What a server tells Prometheus, in a registry of its own, so that two servers in a process do not mix.

Times are in seconds, sizes in tokens; counters only rise. Labels have few values: addresses are those that exist here
(the rest is "other"), never what a caller sent. A summary of what to look at: `llm_time_to_first_token_seconds` is
what a reader waits, `llm_time_between_tokens_seconds` how fluently it reads, `llm_waiting` whether the machine is
enough.
"""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

TIMES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The counters, gauges and histograms of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # memory, processor time, open files

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"llm_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = TIMES, *labels: str) -> Histogram:
            return Histogram(f"llm_{name}", text, labels, buckets=buckets, registry=registry)

        self.requests = counter("requests", "Requests answered", "endpoint", "status")
        self.request_seconds = histogram("request_seconds", "From head to last byte", TIMES, "endpoint")
        self.first_token = histogram("time_to_first_token_seconds", "From the queue to the first token")
        self.between_tokens = histogram("time_between_tokens_seconds", "From one token to the next")
        self.batch_size = histogram("batch_size", "Sequences in a step", SIZES)
        self.step_seconds = histogram("step_seconds", "One step of the engine")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.new_tokens = counter("generated_tokens", "Tokens written")
        self.sequences = counter("sequences", "Sequences that ended", "reason")
        self.refused = counter("refused", "Requests refused because the queue is full")
        self.failed_steps = counter("failed_steps", "Steps of the engine that raised an error")

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Show a number that is read when somebody asks."""
        Gauge(f"llm_{name}", text, registry=self.registry).set_function(read)

    def page(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)
