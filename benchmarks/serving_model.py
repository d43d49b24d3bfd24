"""Simulates, on paper, many adapters served by many replicas: nothing printed here was measured.

    python benchmarks/serving_model.py [--adapters 10000] [--rate 1000] [--replicas 40] [--seconds 60] [--json FILE]

Requests come as a Poisson process, each with an adapter (Zipf, uniform, or one for all) and lengths as in S-LoRA's
workload (arXiv:2311.03285). A replica runs steps as vLLM's scheduler does: every request that writes has a token in each,
what is left of the step's tokens goes to prompts, and before a step its new requests' adapters come to the device, the one
used longest ago giving way. A router sends a request to a replica at random, or to one of the two that are its adapter's own,
the less busy, unless that has a quarter more to do than the mean, and then to a random one (consistent hashing with bounded
loads, arXiv:1608.01350). All that is believed of the machine is in Assumptions.
"""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict, deque
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Assumptions:
    """Of a 7B model in bf16 (32 layers of 4096) on an H100, and LoReFT of rank 4 at f5+l5. All assumed, none measured."""

    weights_s: float = 13.5e9 / 2.7e12  # the weights once through the memory, 80% of 3.35 TB/s
    token_s: float = 2 * 6.7e9 / 0.5e15  # the arithmetic of a token, at half of the peak
    context_s: float = 0.5e6 / 2.7e12  # the keys and values of a token of context
    step_s: float = 1e-3  # scheduler and launches
    step_tokens: int = 2048
    batch: int = 256
    layers: int = 32
    edit_s: float = 6e-6  # a layer's edit in a step that has prompts: a launch, and some rows
    load_s: float = 0.3e-3  # an adapter from the host to the device: 2.1 MB at 25 GB/s, and five copies' starts
    disk_s: float = 2e-3  # and to the host from its folder
    device_adapters: int = 1000
    host_adapters: int = 10_000  # 21 GB of the host's memory, there from the start


class Lru:
    """The last ``size`` keys, the first ones to begin with."""

    def __init__(self, size: int, begin: int = 0):
        self.size, self.held = size, OrderedDict.fromkeys(range(begin))

    def has(self, key: int) -> bool:
        """Whether it was there; it is now, and the one used longest ago is not."""
        there = key in self.held
        self.held[key] = None
        self.held.move_to_end(key)
        if len(self.held) > self.size:
            self.held.popitem(last=False)
        return there


class Replica:
    """One GPU's queue, batch and adapters."""

    def __init__(self, of: Assumptions, edits: bool):
        self.of, self.edits, self.now = of, edits, 0.0
        self.waiting: deque[int] = deque()
        self.reading: OrderedDict[int, int] = OrderedDict()  # request: tokens of its prompt that are left
        self.writing = np.empty(0, dtype=np.int64)
        self.device, self.host = Lru(of.device_adapters), Lru(of.host_adapters, of.host_adapters)
        self.loads = self.steps = self.reads = 0

    @property
    def load(self) -> int:
        return len(self.waiting) + len(self.reading) + len(self.writing)

    def step(self, w: Workload) -> None:
        """One step: what is written, then prompts as far as its tokens go."""
        of = self.of
        while self.waiting and len(self.reading) + len(self.writing) < of.batch:
            request = self.waiting.popleft()
            self.reading[request] = int(w.prompt[request])
            adapter = int(w.adapter[request])
            if self.edits and not self.device.has(adapter):
                self.loads += 1
                self.now += of.load_s
                if not self.host.has(adapter):
                    self.now += of.disk_s
        tokens = len(self.writing)
        room, read, done = of.step_tokens - tokens, 0, []
        for request in list(self.reading):
            some = min(room - read, self.reading[request])
            self.reading[request] -= some
            read += some
            if not self.reading[request]:
                done.append(request)
            if read == room:
                break
        context = int((w.prompt[self.writing] + w.written[self.writing]).sum()) + read
        self.now += max(of.weights_s, (tokens + read) * of.token_s) + context * of.context_s + of.step_s
        if self.edits and read:
            self.now += of.layers * of.edit_s
            self.reads += 1
        self.steps += 1
        w.written[self.writing] += 1
        for request in done:
            del self.reading[request]
            w.written[request] = 1
            w.first[request] = self.now
        self.writing = np.concatenate([self.writing, np.array(done, dtype=np.int64)])
        finished = w.written[self.writing] >= w.output[self.writing]
        w.last[self.writing[finished]] = self.now
        self.writing = self.writing[~finished]


class Workload:
    """Requests, and when their first and last tokens came."""

    def __init__(self, seconds: float, rate: float, adapters: int, popularity: str, seed: int = 0):
        drawn = np.random.default_rng(seed)
        count = int(seconds * rate)
        self.arrival = np.cumsum(drawn.exponential(1 / rate, count))
        self.prompt, self.output = drawn.integers(8, 513, count), drawn.integers(8, 513, count)
        if popularity == "one":
            self.adapter = np.zeros(count, dtype=np.int64)
        else:
            share = np.ones(adapters) if popularity == "uniform" else 1 / np.arange(1, adapters + 1)
            self.adapter = drawn.choice(adapters, count, p=share / share.sum())
        self.written = np.zeros(count, dtype=np.int64)
        self.first, self.last = np.full(count, np.nan), np.full(count, np.nan)


def run(of: Assumptions, w: Workload, replicas: int, edits: bool, own: bool) -> dict[str, float]:
    """All of a workload through the replicas, and what its middle part met."""
    there = [Replica(of, edits) for _ in range(replicas)]
    drawn = np.random.default_rng(1)
    for request, arrival in enumerate(w.arrival):
        for replica in there:
            while replica.now < arrival:
                if not replica.load:
                    replica.now = float(arrival)
                    break
                replica.step(w)
        chosen = there[int(drawn.integers(replicas))]
        if own:
            seeded = np.random.default_rng(int(w.adapter[request]))
            best = min((there[i] for i in seeded.choice(replicas, 2, replace=False)), key=lambda r: r.load)
            if best.load <= 1 + 1.25 * sum(r.load for r in there) / replicas:
                chosen = best
        chosen.waiting.append(request)
    for replica in there:
        while replica.load:
            replica.step(w)
    end = w.arrival[-1]
    some = (w.arrival > 0.3 * end) & (w.arrival < 0.9 * end)
    first = w.first[some] - w.arrival[some]
    each = (w.last[some] - w.first[some]) / np.maximum(w.output[some] - 1, 1)
    return {
        "tokens/s": float(w.output.sum() / max(replica.now for replica in there)),
        "TTFT median ms": 1e3 * float(np.median(first)),
        "TTFT 99% ms": 1e3 * float(np.quantile(first, 0.99)),
        "TPOT median ms": 1e3 * float(np.median(each)),
        "TPOT 99% ms": 1e3 * float(np.quantile(each, 0.99)),
        "loads a request": sum(r.loads for r in there) / len(w.arrival),
        "steps with prompts": sum(r.reads for r in there) / max(1, sum(r.steps for r in there)),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    arguments.add_argument("--adapters", type=int, default=10_000)
    arguments.add_argument("--rate", type=float, default=1000, help="requests a second")
    arguments.add_argument("--replicas", type=int, default=40)
    arguments.add_argument("--seconds", type=float, default=60, help="of arrivals")
    arguments.add_argument("--json", help="a file for the figures")
    chosen = arguments.parse_args()
    of = Assumptions()
    cases = {
        "base": ("one", False, False),
        "one adapter": ("one", True, False),
        "Zipf, any replica": ("zipf", True, False),
        "Zipf, its own replicas": ("zipf", True, True),
        "uniform, any replica": ("uniform", True, False),
        "uniform, its own replicas": ("uniform", True, True),
    }
    rows = []
    print(
        f"simulated, not measured: {chosen.adapters} adapters, {chosen.rate:g} requests/s, {chosen.replicas} replicas"
    )
    for name, (popularity, edits, own) in cases.items():
        w = Workload(chosen.seconds, chosen.rate, chosen.adapters, popularity)
        rows.append({"case": name, **run(of, w, chosen.replicas, edits, own)})
        print("  ".join(f"{key} {value:.4g}" if key != "case" else f"{value:26}" for key, value in rows[-1].items()))
    if chosen.json:
        given = {name: value for name, value in vars(chosen).items() if name != "json"}
        written = {"simulated": True, "assumptions": asdict(of), **given, "cases": rows}
        Path(chosen.json).write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
