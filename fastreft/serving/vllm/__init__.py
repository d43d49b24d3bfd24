"""A plugin of vLLM's (entry point ``vllm.general_plugins``): ReFT adapters a request, without a fork.

With FASTREFT_ADAPTERS set to a folder of adapters, a request names one of them, offline by ``SamplingParams(extra_args={"reft":
name})`` and over HTTP by ``"vllm_xargs": {"reft": name}``. Batching, streaming, cancelling and parallelism stay vLLM's. Two
places are hooked: where a request comes in (:mod:`.front`: the name is looked up, and its fingerprint salts the prefix cache)
and where a worker runs the model (:mod:`.worker`: what the decoder's layers give is edited). Tried with vLLM 0.32.

FASTREFT_VECTORS (default 4096) and FASTREFT_LINES (1024): the pool's room on the device; FASTREFT_MOST_R (64).
"""

from __future__ import annotations

from . import environment


def register() -> None:
    """What vLLM calls in each of its processes, perhaps more than once; nothing where no adapters are named."""
    if environment.adapters() is not None:
        from . import front, worker

        front.hook()
        worker.hook()
