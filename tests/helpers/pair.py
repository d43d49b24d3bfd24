"""`fastreft` in two processes that work together over gloo, forked off one that has the modules: a launcher takes longer."""

from __future__ import annotations

import faulthandler
import os
import sys
from pathlib import Path

import forked
from torch import distributed


def run(folder: Path, *arguments: str, as_gpus: bool = False) -> list[str]:
    """Both to their end, which has to be a good one: what each has said, on stdout and stderr. ``as_gpus``: accelerate takes
    them for such, as it shards models over GPUs alone."""
    from_one = forked.processes()
    # They meet at a free port of this process's own, as torchrun has it.
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    files = [folder / f"said-{rank}" for rank in (0, 1)]
    started = [
        from_one.Process(target=_run, args=(rank, store.port, str(file), arguments, as_gpus))
        for rank, file in enumerate(files)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    codes, said = [process.exitcode for process in started], [file.read_text() for file in files]
    assert codes == [0, 0], "\n".join(("", *said))
    return said


def _run(rank: int, port: int, file: str, arguments: tuple[str, ...], as_gpus: bool) -> None:
    import torch

    from fastreft.cli import main

    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(file, "w", buffering=1)  # noqa: SIM115
    faulthandler.enable(sys.stderr, all_threads=True)
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    if as_gpus:
        _take_for_gpus()
    sys.exit(main(arguments))


def _take_for_gpus() -> None:
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    begin = PartialState.__init__

    def begin_as_gpus(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = begin_as_gpus
