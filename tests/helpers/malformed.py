"""Requests to a server that are wrong, each in its way."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

GOOD = {"model": "ada", "prompt": [5, 6, 7], "max_tokens": 2, "temperature": 0}
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    10**30,
    -(10**30),
    "",
    "x",
    "\x00",
    "é" * 300,
    [],
    {},
    [[]],
    {"a": 1},
    [None],
    "ada\n",
]
NAMES = ["", ".", "..", "../ada",
         "ada/", "/ada", "ada/../ada", "ADA", "ada ", "a" * 300, "a" * 100_000, "\x00", "ada\x00", "naïve",
         "embedded/ada", "__base__", "%2e%2e", ".hidden", "{{7*7}}", "ada;bob", "lora", "\ud800"]  # fmt: skip
ARGUMENTS: list[Any] = [1, "reft", ["reft"], {"reft": {"name": "ada"}}, {"reft": None}]


def requests(spoilt: list[str], count: int) -> Iterator[tuple[str, bytes]]:
    """(what it is, a body for /v1/completions), ``count`` of them; ``spoilt`` are names of adapters that cannot be served."""
    draw = random.Random(0)
    whole = json.dumps(GOOD).encode()
    kinds = [
        lambda: ("cut", whole[: draw.randrange(len(whole))]),
        lambda: ("junk", bytes(draw.randrange(256) for _ in range(draw.randrange(1, 60)))),
        lambda: ("no object", json.dumps(draw.choice([1, "ada", [], [GOOD], None, True])).encode()),
        lambda: _with("unknown model", model=draw.choice([name for name in NAMES if name])),
        lambda: _with("unknown adapter", model="embedded", vllm_xargs={"reft": draw.choice(NAMES)}),
        lambda: _with("odd adapter", model="embedded", vllm_xargs={"reft": draw.choice([v for v in ODD if v != "ada"])}),
        lambda: _with("odd arguments", vllm_xargs=draw.choice(ARGUMENTS)),
        lambda: _with("another adapter", vllm_xargs={"reft": "bob"}),
        lambda: _with("strength", vllm_xargs={draw.choice(["reft_strength", "REFT"]): draw.choice([-1, 0.5, 1e308])}),
        lambda: _with("spoilt", model=draw.choice(spoilt)),
        lambda: _with("spoilt, by argument", model="embedded", vllm_xargs={"reft": draw.choice(spoilt)}),
        lambda: _with("spoilt, in a stream", model=draw.choice(spoilt), stream=True),
        lambda: _with("beams", use_beam_search=True, n=2),
        lambda: _with("max_tokens", max_tokens=draw.choice([-1, -(10**9), "many", [], 1.5])),
        lambda: _with("temperature", temperature=draw.choice([-1, "hot", [], -1e308])),
        lambda: _with("prompt", prompt=draw.choice([None, 1, {}, [[]], [10**9], [-5], [5] * 300, [1.5]])),
        lambda: _with("model", model=draw.choice([1, [], {}, True, ["ada"]])),
        lambda: _with("n", n=draw.choice([-1, "two", [], 10**30])),
    ]  # fmt: skip
    for i in range(count):
        yield kinds[i % len(kinds)]()


def _with(what: str, **changes: Any) -> tuple[str, bytes]:
    return what, json.dumps(GOOD | changes).encode()
