"""A plugin of vLLM's (entry point ``vllm.general_plugins``): ReFT adapters a request, without a fork.

With FASTREFT_ADAPTERS set to a folder of adapters, a request names one of them, over HTTP as its model, and offline by
``SamplingParams(extra_args={"reft": name})``. Batching, streaming, cancelling and parallelism stay vLLM's. Three places are
hooked: what models a server has (:mod:`.server`), where a request comes in (:mod:`.front`: the name is looked up on the
:mod:`.shelf`, and its fingerprint salts the prefix cache) and where a worker runs the model (:mod:`.worker`: what the decoder's
layers give is edited). Tried with vLLM 0.32.

FASTREFT_VECTORS (default 4096) and FASTREFT_LINES (1024): the pool's room on the device; FASTREFT_MOST_R (64).
"""

from __future__ import annotations

import os

from . import environment


def register() -> None:
    """What vLLM calls in each of its processes, perhaps more than once; nothing where no adapters are named."""
    if environment.adapters() is not None:
        # Of vLLM's two model runners the plugin knows the older; with Triton there, the newer is what vLLM takes.
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
        from . import front, server, worker

        front.hook()
        server.hook()
        worker.hook()
