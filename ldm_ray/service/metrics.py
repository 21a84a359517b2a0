"""Figures for Prometheus, of one replica."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ldm_ray.engine.slots import Slots

BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
Live = Callable[[], dict[str, Slots]]


class Metrics:
    """Counters of requests, and what the slots of every loaded model count."""

    def __init__(self, live: Live) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("ldm_requests", "Requests answered", ["route", "status"], registry=self.registry)
        self.latency = Histogram(
            "ldm_request_seconds", "From request to answer", ["route"], buckets=BUCKETS, registry=self.registry
        )
        self.stages = Histogram(
            "ldm_stage_seconds", "sample: waiting and denoising; encode", ["stage"], buckets=BUCKETS,
            registry=self.registry,
        )  # fmt: skip
        self.refused = Counter("ldm_refused", "Requests refused", ["code"], registry=self.registry)
        self.reloads = Counter("ldm_reloads", "Changes of checkpoint", ["result"], registry=self.registry)
        self.registry.register(OfSlots(live))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class OfSlots(Collector):
    """Read when asked for."""

    def __init__(self, live: Live) -> None:
        self.live = live

    def collect(self) -> Iterable[Metric]:
        slots = self.live()
        counters = {
            "ldm_steps": ("Denoising steps of images", lambda s: s.figures.steps),
            "ldm_rows": ("The same with the rows that only fill tiles up: steps / rows is the fill", rows),
            "ldm_images": ("Images finished", lambda s: s.figures.images),
            "ldm_busy_seconds": ("Seconds of work", lambda s: s.figures.busy_s),
        }
        gauges = {
            "ldm_queue_work": ("Denoiser rows taken and not finished", lambda s: s.outstanding),
            "ldm_images_live": ("Images on their way", lambda s: len(s.live)),
            "ldm_rows_per_second": ("Denoiser rows per second while busy, lately", lambda s: s.rate),
        }
        for name, (told, read) in counters.items():
            counter = CounterMetricFamily(name, told, labels=["model"])
            for model, one in slots.items():
                counter.add_metric([model], read(one))
            yield counter
        for name, (told, read) in gauges.items():
            gauge = GaugeMetricFamily(name, told, labels=["model"])
            for model, one in slots.items():
                gauge.add_metric([model], read(one))
            yield gauge


def rows(slots: Slots) -> int:
    return slots.figures.rows
