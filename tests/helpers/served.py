"""Adapters of the embedded model, what Transformers writes with each, and vLLM's server that has them."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import fastreft
from fastreft.tasks.places import EMBEDDED_PATH

KINDS: dict[str, dict[str, Any]] = {
    "ada": dict(r=4, positions="f2+l3"),
    "bob": dict(r=3, positions="f4+l2", tied=False, act_fn="relu"),
    "cid": dict(r=2, positions="all", intervention_type="noreft", add_bias=True),
    "dot": dict(r=2, positions="decode"),
    "eve": dict(r=4, positions="d3"),
    "fay": dict(r=4, positions="3:12"),
}


def base_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(EMBEDDED_PATH, dtype=torch.float32).eval()


def saved(folder: Path, seed: int, settings: dict[str, Any]) -> Any:
    """An adapter that changes what is written, in a folder; and its model."""
    torch.manual_seed(seed)
    config = fastreft.ReftConfig(task_type="CAUSAL_LM", init_weights="random", **settings)
    model = fastreft.get_reft_model(base_model(), config).eval()
    model.save_pretrained(folder, save_embedding_layers=False)
    return model


def loaded(folder: Path) -> Any:
    return PeftModel.from_pretrained(base_model(), folder).eval()


def written(model: Any, ids: list[int], tokens: int) -> tuple[list[int], float]:
    """What a model writes, greedily, and by how much the least sure of its tokens was ahead of the next."""
    out = model.generate(
        input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), pad_token_id=0,
        max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    best = torch.stack([scores[0] for scores in out.scores]).topk(2).values
    return out.sequences[0, len(ids) :].tolist(), float((best[:, 0] - best[:, 1]).min())


class Server:
    """``fastreft serve`` of the embedded model in a process of its own, with what it says in ``log``; a context."""

    def __init__(self, adapters: Path, log: Path, *flags: str, eager: bool = True):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        self._command = [
            sys.executable, "-m", "fastreft", "serve", "--model", "embedded", "--adapters", str(adapters),
            "--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--max-model-len", "256",
            "--max-num-seqs", "8", "--max-num-batched-tokens", "64", *["--enforce-eager"][:eager], *flags,
        ]  # fmt: skip
        self._environment = {
            **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def __enter__(self) -> Server:
        with self.log.open("w") as out:
            self.process = subprocess.Popen(self._command, env=self._environment, stdout=out, stderr=subprocess.STDOUT)
        until = time.monotonic() + 600
        while time.monotonic() < until and self.process.poll() is None:
            try:
                if self.get("/health")[0] == 200:
                    return self
            except OSError:
                time.sleep(1)
        self.__exit__()
        raise RuntimeError(f"the server did not start: {self.log.read_text(errors='replace')[-2000:]}")

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    def post(self, body: Any, path: str = "/v1/completions") -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, data, {"Content-Type": "application/json"})
        return connection.getresponse()

    def ask(self, body: Any, path: str = "/v1/completions") -> tuple[int, Any]:
        """(status, what is answered)."""
        answer = self.post(body, path)
        return answer.status, json.loads(answer.read())

    def stream(self, body: Any, path: str = "/v1/completions") -> Iterator[Any]:
        """The parts of an answer as they come; whoever leaves off has gone away."""
        answer = self.post({**body, "stream": True}, path)
        try:
            assert answer.status == 200, answer.read()
            for line in answer:
                text = line.decode().strip().removeprefix("data: ")
                if text and text != "[DONE]":
                    yield json.loads(text)
        finally:
            answer.close()

    def memory(self) -> dict[str, float]:
        """MB of each process of the server, by its command's last word and number."""
        processes = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        return {f"{each.name()} {each.pid}": each.memory_info().rss / 2**20 for each in processes}

    def gauge(self, name: str) -> float:
        """One of vLLM's metrics."""
        lines = self.get("/metrics")[1].splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"vllm:{name}{{"))


def greedy(ids: list[int], tokens: int) -> dict[str, Any]:
    """The fields of a request for so many tokens after a prompt, answered with their numbers."""
    return {"prompt": ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
