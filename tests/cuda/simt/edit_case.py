"""Edits on the simulated device, and what they must come to: fp64, and plain torch in the state's own dtype."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from simt import harness
from torch import Tensor

from fastreft import reference
from fastreft.ops import activations

METHODS = {  # which of U, V, P, b, c a method has, and whether P is U
    "loreft": ("UVPb", True),
    "noreft": ("UVPbc", True),
    "direft": ("UVb", False),
    "consreft": ("UPb", True),
    "lobireft": ("Ub", False),
    "untied": ("UVPbc", False),
}


@dataclass
class Edit:
    method: str = "loreft"
    n: int = 9
    d: int = 64
    r: int = 4
    dtype: torch.dtype = torch.float32
    weights: torch.dtype = torch.float32
    act: str = "linear"
    rows: list[int] | None = None  # positions in a state of `total` rows, edited in place
    apart: bool = False  # with rows: edited into other memory, which the launch fills
    total: int = 0
    batch_inner: int = 0  # > 0: the state is a transposed [inner, outer, d] view
    skew: int = 0
    device: tuple[int, int, int, int, int] = harness.H200
    seed: int = 1
    want_dh: bool = True
    frozen: str = ""
    order: int = 1  # the seed of the threads' order
    plant: str = ""
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        names, self.tied = METHODS[self.method]
        self.total = self.total or (self.n if self.rows is None else max(self.rows) + 2)
        if self.rows is not None:
            self.n = len(self.rows)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.state = normal(self.total, self.d).to(self.dtype)
        self.grad = normal(self.total, self.d).to(self.dtype)
        for name in names:
            if name in "bc":
                self.tensors[name] = normal(self.r).to(self.weights)
            elif name == "P" and self.tied:
                self.tensors["P"] = self.tensors["U"]
            else:
                self.tensors[name] = (normal(self.r, self.d) / self.d**0.5).to(self.weights)

    def live(self) -> list[int]:
        """The positions in `rows` that name a row."""
        if self.rows is None:
            return list(range(self.n))
        return [i for i, row in enumerate(self.rows) if 0 <= row < self.total]

    def expected(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Output and gradients by autograd over the oracle, everything in `dtype` (the state rounded as given first)."""
        w = {
            k: v.to(dtype, copy=True).requires_grad_() for k, v in self.tensors.items() if not (k == "P" and self.tied)
        }
        h = self.state.to(dtype, copy=True).requires_grad_()
        act = None if self.act == "linear" else activations.torch_fn(self.act)
        args = [w.get("U" if k == "P" and self.tied and "P" in self.tensors else k) for k in "UVPbc"]
        if self.rows is None:
            out = reference.edit(h, *args, act=act)
        else:
            rows = torch.tensor([r if r < self.total else -1 for r in self.rows], dtype=torch.int64)
            out = reference.edit_rows(h, rows, *args, act=act)
        out.backward(self.grad.to(dtype))
        result = {"out": out.detach(), "dh": h.grad}
        result |= {"d" + k: v.grad for k, v in w.items()}
        return result

    def run(self, runner, folder) -> dict[str, Tensor]:
        """Forward and backward on the simulated device."""
        case = harness.Case(runner, folder, device=self.device, seed=self.order, plant=self.plant)
        total, d, r, n, dtype = self.total, self.d, self.r, self.n, self.dtype
        accumulation = torch.float64 if dtype == torch.float64 else torch.float32
        kept = r if self.act == "linear" else 2 * r
        listed = self.rows is not None
        strides = {}
        if self.batch_inner:
            strides = {"inner": self.batch_inner, "outer_stride": d, "inner_stride": total // self.batch_inner * d}

        def laid_out(x: Tensor) -> Tensor:
            return x.view(-1, self.batch_inner, d).transpose(0, 1).contiguous() if self.batch_inner else x

        def rows_of(key: str, block: str) -> None:
            case.set(**{key: block}, **{f"{key}__{k}": v for k, v in strides.items()})

        def common() -> None:
            case.set(n=n, total=total, d=d, r=r, type=harness.TYPES[dtype])
            case.set(act=activations.find(self.act).number, tied=int(self.tied))
            case.set(index="index" if listed else None)
            for k in self.tensors:
                case.set(**{k: "w" + ("U" if k == "P" and self.tied else k), f"{k}__type": harness.TYPES[self.weights]})

        for k, v in self.tensors.items():
            case.load("w" + k, v, skew=self.skew and max(self.skew, v.element_size()))
        if listed:
            case.load("index", torch.tensor(self.rows, dtype=torch.int64))
        case.load("h", laid_out(self.state), skew=self.skew)
        case.load("g", laid_out(self.grad), skew=self.skew)
        case.make("z", (n, kept), accumulation)
        out, dh, saved = "h", "g", "saved" if listed else None
        if listed:
            case.make("saved", (n, d), dtype)
        if self.apart or not listed:
            case.make("out", (total, d), dtype)
            case.make("dh", (total, d), dtype)
            out, dh = "out", "dh"
        common()
        rows_of("h", "h")
        rows_of("out", out)
        case.set(z="z", saved=saved)
        case.call("forward")
        common()
        rows_of("g", "g")
        if self.want_dh:
            rows_of("dh", dh)
        if listed:
            case.set(h="saved")
        else:
            rows_of("h", "h")
        case.set(z="z")
        wanted = [k for k in self.tensors if not (k == "P" and self.tied) and k not in self.frozen]
        for k in wanted:
            case.make("d" + k, tuple(self.tensors[k].shape), self.weights)
            case.set(**{"d" + k: "d" + k})
        case.call("backward")
        case.want(out, "z", "g", *("d" + k for k in wanted))
        if self.want_dh:
            case.want(dh)
        got = case.run()
        if dh != "g" or not self.want_dh:
            assert torch.equal(got["g"], laid_out(self.grad)), "g was only to be read"
        result = {"out": got[out], "z": got["z"]} | {"d" + k: got["d" + k] for k in wanted}
        if self.want_dh:
            result["dh"] = got[dh]
        if self.batch_inner:
            for k in ("out", "dh"):
                result[k] = result[k].view(self.batch_inner, -1, d).transpose(0, 1).reshape(total, d)
        return result


def worst_excess(edit: Edit, got: dict[str, Tensor]) -> dict[str, float]:
    """Error against fp64 over what is allowed: twice the error of plain torch in the state's dtype, plus one rounding."""
    exact, plain = edit.expected(torch.float64), edit.expected(edit.dtype)
    result = {}
    for name, x in got.items():
        if name == "z":
            continue
        scale = exact[name].abs().max().item()
        error = (x.double() - exact[name]).abs().max().item()
        if edit.dtype == torch.float64:  # nothing here is more exact than fp64: allow its own sums' rounding
            plain = {name: exact[name] + torch.finfo(torch.float64).eps * edit.d**0.5 * scale}
        allowed = 2 * (plain[name].double() - exact[name]).abs().max().item() + torch.finfo(x.dtype).eps * scale
        result[name] = 0.0 if error == 0 else error / allowed if allowed and error == error else float("inf")
    return result
