"""Where a request comes in: an adapter's name becomes its content, or the request is refused."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import wraps
from pathlib import Path
from typing import Any

from ..adapter import read
from .environment import ADAPTERS, adapters, most_r

ARGUMENT = "reft"  # of a request's extra_args: an adapter's name, and for the workers (fingerprint, folder)
FILES = ("adapter_config.json", "adapter_model.safetensors")


class Shelf:
    """The adapters in a folder, a folder each. What was read once is copied aside under its fingerprint: the workers read the
    copy, whatever becomes of the folder meanwhile."""

    def __init__(self, folder: Path, layers: int, width: int, most_r: int):
        self.folder, self.layers, self.width, self.most_r = folder, layers, width, most_r
        self.copies = Path(tempfile.mkdtemp(prefix="fastreft-served-"))
        atexit.register(shutil.rmtree, self.copies, ignore_errors=True)
        self._known: dict[str, tuple[Any, str]] = {}  # name -> (the files' marks, fingerprint)

    def names(self) -> list[str]:
        """The adapters that there are now."""
        return sorted(path.parent.name for path in self.folder.glob(f"*/{FILES[0]}"))

    def find(self, name: Any) -> tuple[str, str]:
        """(fingerprint, folder of the copy); ``ValueError`` for a name that there is not, and for an adapter that is spoilt or
        not this model's."""
        if (
            not isinstance(name, str)
            or not name
            or Path(name).name != name
            or not (self.folder / name / FILES[0]).is_file()
        ):
            raise ValueError(
                f"there is no adapter {name!r}; see the folder of {ADAPTERS}, which has {len(self.names())}"
            )
        folder = self.folder / name
        marks = tuple((folder / file).stat().st_mtime_ns if (folder / file).is_file() else 0 for file in FILES)
        known = self._known.get(name)
        if known is None or known[0] != marks:
            known = self._known[name] = (marks, self._copied(folder))
        return known[1], str(self.copies / known[1])

    def _copied(self, folder: Path) -> str:
        staging = Path(tempfile.mkdtemp(dir=self.copies))
        try:
            for file in FILES:
                if (folder / file).is_file():
                    shutil.copy(folder / file, staging / file)
            adapter = read(staging, self.layers, self.width)
            rank = int(adapter.lines[..., 1].max())
            if rank > self.most_r:
                raise ValueError(f"has rank {rank}; FASTREFT_MOST_R is {self.most_r}")
        except ValueError as error:
            shutil.rmtree(staging)
            raise ValueError(f"the adapter '{folder.name}' cannot be served: {str(error).replace(str(staging), folder.name)}") \
                from None  # fmt: skip
        target = self.copies / adapter.fingerprint
        if target.exists():
            shutil.rmtree(staging)
        else:
            staging.rename(target)
        return adapter.fingerprint


def hook() -> None:
    """Wrap ``InputProcessor.process_inputs``, through which every request comes, whatever asked for it."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    theirs = InputProcessor.process_inputs
    if hasattr(theirs, "_reft"):
        return

    @wraps(theirs)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = theirs(self, *args, **kwargs)
        params = request.sampling_params
        extra = getattr(params, "extra_args", None) or {}
        if ARGUMENT not in extra:
            return request
        shelf = self.__dict__.get("_reft_shelf")
        if shelf is None:
            model = self.model_config
            layers, width = model.get_total_num_hidden_layers(), model.get_hidden_size()
            shelf = self._reft_shelf = Shelf(Path(str(adapters())), layers, width, most_r())
        try:
            fingerprint, folder = shelf.find(extra[ARGUMENT])
        except ValueError as error:  # over HTTP a 400 with its sentence
            raise VLLMValidationError(str(error)) from error
        params.extra_args = {**extra, ARGUMENT: [fingerprint, folder]}
        # Blocks of the prefix cache hold edited keys and values: another adapter's are not this one's.
        request.cache_salt = f"{request.cache_salt or ''}reft:{fingerprint}"
        return request

    process_inputs._reft = True  # type: ignore[attr-defined]
    InputProcessor.process_inputs = process_inputs  # type: ignore[method-assign]
