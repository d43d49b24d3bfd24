"""Clients of a server and a hand that changes its adapters, for so many seconds; and what became of every request."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from served import KINDS, Server, base_model, greedy, saved, written

TOKENS, NAMES, CLIENTS = 8, 6, 6
SURE = 0.01  # by so much is each token ahead of the next, as the sums of another batch differ in their last bits


class Contents(NamedTuple):
    """Folders of adapters, prompts, and what is to be written: by folder's name, or "embedded", a list a prompt."""

    folders: list[Path]
    prompts: list[list[int]]
    expected: dict[str, list[list[int]]]


def made(folder: Path, count: int = 8) -> Contents:
    """Adapters of all kinds and prompts on which none of them hesitates."""
    models = {"embedded": base_model()}
    for i in range(count):
        models[f"content{i}"] = saved(folder / f"content{i}", i, list(KINDS.values())[i % len(KINDS)])
    generator = torch.Generator().manual_seed(1)
    prompts: list[list[int]] = []
    expected: dict[str, list[list[int]]] = {name: [] for name in models}
    lengths = [3, 9, 17, 40, 70, 150]
    while len(prompts) < len(lengths):
        ids = torch.randint(20, 1000, (lengths[len(prompts)],), generator=generator).tolist()
        found = {name: written(model, ids, TOKENS) for name, model in models.items()}
        if min(ahead for _, ahead in found.values()) > SURE:
            prompts.append(ids)
            for name, (tokens, _) in found.items():
                expected[name].append(tokens)
    return Contents([folder / name for name in models if name != "embedded"], prompts, expected)


@dataclass
class Report:
    """What was asked and what came; ``memory`` is MB of all processes, by second."""

    sent: int = 0
    right: int = 0
    refused: int = 0
    vanished: int = 0
    changes: int = 0
    faults: list[str] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)

    def growth(self) -> float:
        """MB between the second quarter and the last."""
        found = [each for _, each in self.memory]
        quarter = max(1, len(found) // 4)
        return median(found[-quarter:]) - median(found[quarter : 2 * quarter] or found)

    def lines(self) -> list[str]:
        """In words."""
        steps = self.memory[:: max(1, len(self.memory) // 10)]
        return [
            f"{self.sent} requests: {self.right} right, {self.refused} refused while their adapter was away, "
            f"{self.vanished} left by their clients, {len(self.faults)} faults; {self.changes} changes of adapters",
            "MB of the server's processes: " + ", ".join(f"{mb:.0f} at {second:.0f} s" for second, mb in steps),
            f"grown by {self.growth():.1f} MB from the second quarter to the last",
            *self.faults[:5],
        ]


class Shelf:
    """The names that are served now. A change is known from before it is made until after: an answer may be of either side."""

    def __init__(self, folder: Path, contents: list[Path]):
        self.folder, self.contents = folder, contents
        self.history: dict[str, list[tuple[float, float, str | None]]] = {f"name{i}": [] for i in range(NAMES)}
        self.lock = threading.Lock()
        for name, content in zip(self.history, contents, strict=False):
            self._change(name, content.name)

    def _change(self, name: str, content: str | None) -> None:
        """Have a name stand for a content, in one step: a link that is renamed over another; or for none."""
        before = time.monotonic()
        with self.lock:
            self.history[name].append((before, float("inf"), content))
        at = self.folder / name
        if content is None:
            at.unlink()
        else:
            link = self.folder / f".{name}"
            link.symlink_to(self.contents[0].parent / content)
            os.replace(link, at)
        with self.lock:
            self.history[name][-1] = (before, time.monotonic(), content)

    def change(self, draw: random.Random) -> None:
        """Replace an adapter, take one away or bring one."""
        name = draw.choice(list(self.history))
        there = self.history[name][-1][2]
        if there is not None and draw.random() < 0.3:
            self._change(name, None)
        else:
            self._change(name, draw.choice([each.name for each in self.contents if each.name != there]))

    def stood_for(self, name: str, start: float, end: float) -> set[str | None]:
        """What a name may have stood for at any time in between."""
        with self.lock:
            told = list(self.history[name])
        ends = [done for _, done, _ in told[1:]] + [float("inf")]
        return {what for (begun, _, what), over in zip(told, ends, strict=True) if begun <= end and over >= start}


def run(server: Server, folder: Path, contents: Contents, seconds: float) -> Report:
    """Ask from several clients at a time until the time is over; every request's end is in the report."""
    report, shelf, lock = Report(), Shelf(folder, contents.folders), threading.Lock()
    begun = time.monotonic()

    def over() -> bool:
        return time.monotonic() - begun > seconds

    def client(number: int) -> None:
        draw = random.Random(number)
        while not over():
            which = draw.randrange(len(contents.prompts))
            name = draw.choice(["embedded", *shelf.history])
            body = {"model": name, **greedy(contents.prompts[which], TOKENS)}
            with lock:
                report.sent += 1
            try:
                outcome, fault = _asked(server, shelf, contents, body, which, draw)
            except Exception as error:  # a request that is lost
                outcome, fault = "faults", f"{name}, prompt {which}: {error!r}"
            with lock:
                if fault is None:
                    setattr(report, outcome, getattr(report, outcome) + 1)
                else:
                    report.faults.append(fault)

    def hand() -> None:
        draw = random.Random(99)
        while not over():
            shelf.change(draw)
            report.changes += 1
            time.sleep(draw.uniform(0.05, 0.6))

    threads = [threading.Thread(target=client, args=(i,)) for i in range(CLIENTS)] + [threading.Thread(target=hand)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        report.memory.append((time.monotonic() - begun, sum(server.memory().values())))
        time.sleep(min(5.0, seconds / 20))
    return report


def _asked(
    server: Server, shelf: Shelf, contents: Contents, body: dict[str, Any], which: int, draw: random.Random
) -> tuple[str, str | None]:
    """(what became of it, what is wrong with that)."""
    name, start = body["model"], time.monotonic()
    if draw.random() < 0.15:
        return _vanishes(server, {**body, "max_tokens": 60}, draw.randrange(4))
    answer = server.post({**body, "stream": draw.random() < 0.3})
    text = answer.read().decode()
    may = {"embedded"} if name == "embedded" else shelf.stood_for(name, start, time.monotonic())
    if answer.status in (400, 404):
        return "refused", None if None in may else f"{name}: {answer.status} {text}"
    if answer.status != 200:
        return "faults", f"{name}: {answer.status} {text}"
    tokens = _tokens(text)
    if tokens is None:  # a stream that ends in an error, as its adapter went between its check and its start
        return "refused", None if None in may else f"{name}: {text}"
    wanted = [contents.expected[each][which] for each in may if each is not None]
    return "right", None if tokens in wanted else f"{name}, prompt {which}: {tokens} is none of {wanted} ({may})"


def _tokens(text: str) -> list[int] | None:
    if not text.startswith("data: "):
        return json.loads(text)["choices"][0]["token_ids"]
    parts = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    if any("error" in part for part in parts):
        return None
    return [token for part in parts for each in part["choices"] for token in each["token_ids"]]


def _vanishes(server: Server, body: dict[str, Any], after: int) -> tuple[str, str | None]:
    """Begin a stream and go away after some of its parts."""
    answer = server.post({**body, "stream": True})
    if answer.status == 200:
        for _ in range(2 * after):
            answer.readline()
    answer.close()
    return "vanished", None
