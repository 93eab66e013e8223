"""Metrics for Prometheus. The router is the clock: every time is taken here, by one clock."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from qsun.serve.asked import Timeline
from qsun.serve.pool import Pool, State

SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
INFO = ("bundle", "decode", "policy")
# Counters of workers that an operator must see; by what `worker_counts` calls them.
ALARMS = {
    "preemptions": "Requests that a worker preempted; on a decode worker each is refused.",
    "expired": "Caches that no decode worker fetched in time.",
    "failed_transfers": "Caches that did not arrive.",
}
# Their quotient over a while is the mean decode batch.
WORK = {
    "generated": "Tokens that a worker generated.",
    "steps": "Steps of a worker's engine.",
}


class Metrics:
    """What the router counts and times, in a registry of its own. `about` has the `INFO`."""

    def __init__(self, pool: Pool, about: Mapping[str, str] | None = None) -> None:
        self._pool = pool
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"qsun_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"qsun_{name}", text, labels, registry=self.registry)

        def seconds(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(
                f"qsun_{name}_seconds", text, labels, registry=self.registry, buckets=SECONDS
            )

        self.requests = counter("requests", "Requests by how they ended.", "task", "outcome")
        self.retries = counter(
            "retries",
            "Attempts that failed before a client got anything.",
            *("task", "worker", "reason"),
        )
        self.queue = seconds("queue", "From arrival to room on a decode worker.", "task")
        self.prefill = seconds("prefill", "The prefill worker's answer.", "task", "prefill_worker")
        self.hand_off = seconds(
            "hand_off",
            "From the prefill worker's answer to the first token.",
            *("task", "prefill_worker", "decode_worker"),
        )
        self.first = seconds("time_to_first_token", "From arrival to the first token.", "task")
        self.between = seconds(
            "inter_token", "Between two tokens of one answer.", "task", "decode_worker"
        )
        self.whole = seconds("request", "From arrival to the last token.", "task")
        self.prompt_tokens = counter("prompt_tokens", "Of answered requests.", "task")
        self.generated = counter("generated_tokens", "Of answers.", "task", "decode_worker")
        self.waiting = gauge("queue_length", "Requests that wait for room.")
        self.ready = gauge("worker_ready", "1 where a worker may be asked.", "worker", "role")
        self.in_flight = gauge("in_flight_requests", "On a decode worker.", "worker")
        self.reserved = gauge(
            "kv_reserved_ratio", "KV blocks set aside for requests, of all.", "worker"
        )
        self.used = gauge(
            "kv_used_ratio", "KV blocks in use, of all, as the worker says.", "worker", "role"
        )
        self.by_worker = {
            name: gauge(f"worker_{name}", f"{text} Since the worker started.", "worker", "role")
            for name, text in (ALARMS | WORK).items()
        }
        self.info = gauge("router_info", "1; its labels say what is served, and how.", *INFO)
        if about is not None:
            self.info.labels(**about).set(1)

    def finished(self, task: str, prompt_tokens: int, times: Timeline, outcome: str) -> None:
        """Count a request that has ended, and its times as far as it came."""
        self.requests.labels(task, outcome).inc()
        if times.admitted:
            self.queue.labels(task).observe(times.admitted - times.received)
        if outcome != "answered":
            return
        self.first.labels(task).observe(times.first - times.received)
        self.whole.labels(task).observe(times.last - times.received)
        self.prompt_tokens.labels(task).inc(prompt_tokens)
        self.generated.labels(task, times.decode_worker).inc(times.generated)

    def exposition(self, waiting: int) -> bytes:
        """Everything as Prometheus reads it."""
        self.waiting.set(waiting)
        for gauge in (
            self.ready,
            self.in_flight,
            self.reserved,
            self.used,
            *self.by_worker.values(),
        ):
            gauge.clear()
        for worker in self._pool:
            name, role = worker.name, worker.address.role
            self.ready.labels(name, role).set(worker.state is State.READY)
            self.used.labels(name, role).set(worker.used)
            if role == "decode":
                self.in_flight.labels(name).set(worker.in_flight)
                self.reserved.labels(name).set(worker.reserved_blocks / max(worker.blocks, 1))
            for count, gauge in self.by_worker.items():
                gauge.labels(name, role).set(worker.counts.get(count, 0))
        return generate_latest(self.registry)
