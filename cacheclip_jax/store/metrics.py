"""What a store did: reads, misses, writes, bytes and latencies by tier, in plain numbers and as Prometheus text."""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from collections.abc import Iterator
from threading import Lock

from cacheclip_jax.errors import BadInput

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """Counters by (what, tier) and histograms of seconds by (operation, tier); safe to share between threads.

    Counted are hits (chunks found, damaged ones too), misses, damaged, unreadable, bytes_read, bytes_written, writes,
    evictions, uploads and upload_failures; timed are read (from the call to the last layer) and write.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._seconds: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0] * (len(SECONDS) + 1))
        self._sums: Counter[tuple[str, str]] = Counter()

    def count(self, what: str, tier: str, n: int = 1) -> None:
        with self._lock:
            self._counts[what, tier] += n

    def time(self, operation: str, tier: str, seconds: float) -> None:
        with self._lock:
            self._seconds[operation, tier][bisect.bisect_left(SECONDS, seconds)] += 1
            self._sums[operation, tier] += seconds  # type: ignore[assignment]

    def snapshot(self) -> dict[str, dict]:
        """{"counts": {what: {tier: n}}, "seconds": {operation: {tier: {"count", "sum", "buckets"}}}}."""
        with self._lock:
            counts: dict[str, dict[str, int]] = defaultdict(dict)
            seconds: dict[str, dict[str, dict]] = defaultdict(dict)
            for (what, tier), n in self._counts.items():
                counts[what][tier] = n
            for (operation, tier), found in self._seconds.items():
                total = self._sums[operation, tier]
                seconds[operation][tier] = {"count": sum(found), "sum": total, "buckets": list(found)}
        return {"counts": dict(counts), "seconds": dict(seconds)}

    def collect(self) -> Iterator:
        """The protocol of prometheus-client's registries: `REGISTRY.register(store.metrics)` exports this store."""
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

        found = self.snapshot()
        for what, tiers in sorted(found["counts"].items()):
            name = f"cacheclip_store_{what}"
            family = CounterMetricFamily(name, f"{what.replace('_', ' ')} of the chunk store", labels=["tier"])
            for tier, n in sorted(tiers.items()):
                family.add_metric([tier], n)
            yield family
        for operation, tiers in sorted(found["seconds"].items()):
            name = f"cacheclip_store_{operation}_seconds"
            times = HistogramMetricFamily(name, f"seconds of a chunk cache's {operation}", labels=["tier"])
            for tier, each in sorted(tiers.items()):
                below, buckets = 0, []
                for limit, n in zip([*map(str, SECONDS), "+Inf"], each["buckets"], strict=True):
                    below += n
                    buckets.append((limit, below))
                times.add_metric([tier], buckets, each["sum"])
            yield times

    def text(self) -> str:
        """All of it in Prometheus's text format; takes the package prometheus-client."""
        try:
            from prometheus_client import CollectorRegistry, generate_latest
        except ImportError:
            raise BadInput("Prometheus text takes another package: pip install 'cacheclip-jax[metrics]'.") from None
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry).decode()
