"""One intervention on disk: pyreft's tensors to and from ours. Knows nothing of models or folders.

| theirs | ours |
|---|---|
| Loreft: weight, bias, rotate_layer (d, r) | W, b, R transposed |
| Direft: learned_source.weight/.bias, an orthogonal parametrization | W, b, R |
| Consreft, Lobireft: learned_source (r,), an orthogonal parametrization | b, R |
| Noreft, Nodireft: proj_layer.weight[/.bias], learned_source.weight/.bias | P, c, W, b |

The parametrization is torch's: ``original`` (d, r) and a dense ``base`` (d, d). Files that hold our own names (pyreft
saving our modules) are read, too.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from ..interventions import INTERVENTIONS, Intervention

_ROTATE = "rotate_layer.parametrizations.weight."
_SOURCE = {"W": "learned_source.weight", "b": "learned_source.bias"}
_PROJECTION = {"P": "proj_layer.weight", "c": "proj_layer.bias", **_SOURCE}
# Our names -> theirs, for what is the same on both sides; R is another matter.
_NAMES: dict[str, dict[str, str]] = {
    "loreft": {"W": "weight", "b": "bias"},
    "direft": _SOURCE,
    "consreft": {"b": "learned_source"},
    "lobireft": {"b": "learned_source"},
    "noreft": _PROJECTION,
    "nodireft": _PROJECTION,
}
_ROTATABLE = ("loreft", "direft", "lobireft")  # those whose edit can be written with another R
_TWINS = {"noreft": "loreft", "nodireft": "direft"}  # the same edits with an R in place of P
_IGNORED = {"embed_dim", "interchange_dim"}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class CheckpointError(ValueError):
    """A checkpoint that is damaged, foreign or does not fit; the message is one sentence that says what and where."""


def kind_of_class(text: str) -> str:
    """The intervention type that a config's class name speaks of, "<class 'pyreft.interventions.LoreftIntervention'>"."""
    found = re.fullmatch(r"<class '[\w.]*?(\w+)Intervention'>", text)
    kind = found[1].lower() if found else ""
    if kind not in INTERVENTIONS:
        raise CheckpointError(f"{text[:120]!r} is none of pyreft's six interventions ({', '.join(INTERVENTIONS)})")
    return kind


def kind_of(intervention: nn.Module) -> str:
    """The intervention type of a module; ``ValueError`` for one that is not one of the six."""
    for kind, its_class in INTERVENTIONS.items():
        if isinstance(intervention, Intervention) and type(intervention).__name__ == its_class.__name__:
            return kind
    raise ValueError(f"a {type(intervention).__name__} is not one of the six interventions that pyreft knows")


def read_tensors(path: Path, *, empty: bool = False) -> dict[str, Tensor]:
    """The tensors of a ``.bin`` file, on the CPU; nothing in it is executed. :class:`CheckpointError` for any other file.

    ``empty`` allows a file without tensors, such as pyreft writes for a base model that is frozen.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file leads torch to nearly any exception
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"cannot read '{path.name}': {reason[0][:200]}") from error
    if not isinstance(state, dict) or not (state or empty):
        raise CheckpointError(f"'{path.name}' holds a {type(state).__name__}; it must hold tensors by name")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"'{path.name}' holds {name!r}, a {type(value).__name__}; it must hold tensors by name"
            )
        if value.layout != torch.strided or value.device.type != "cpu":
            raise CheckpointError(f"'{path.name}': {name!r} is not a plain tensor")
    return state


def to_intervention(
    state: dict[str, Tensor],
    where: str,
    kind: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    dropout: float = 0.0,
    act_fn: str | None = None,
) -> Intervention:
    """Our intervention from a file's tensors; ``kind`` None is told from their names where they tell.

    W, b, P and c get ``dtype`` (default fp32), R at least fp32. ``where`` names the file in a :class:`CheckpointError`: for
    names, shapes or dtypes that are not an intervention's, and values that are not finite.
    """
    kind = kind or _kind_of_names(set(state), where)
    tensors = _ours(state, kind, where)
    main = "R" if INTERVENTIONS[kind].orthonormal else "P"
    if tensors[main].ndim != 2:
        raise CheckpointError(f"{where}: {main} has shape {tuple(tensors[main].shape)}; it must be a matrix")
    r, d = tensors[main].shape
    if not 1 <= r <= d:
        raise CheckpointError(f"{where}: {main} has shape ({r}, {d}), as (r, d); r must be between 1 and d")
    for name, value in tensors.items():
        wanted = (r, d) if name in "RWP" else (r,)
        if tuple(value.shape) != wanted:
            raise CheckpointError(f"{where}: {name} has shape {tuple(value.shape)}; beside {main} it must be {wanted}")
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{where}: {name} ({value.dtype}) holds values that are not finite numbers")
    for name in _IGNORED & state.keys():
        if state[name].numel() != 1 or int(state[name]) != d:
            raise CheckpointError(f"{where}: {name} is {state[name].tolist()}, but its matrices are {d} wide")
    made = INTERVENTIONS[kind](
        embed_dim=d, low_rank_dimension=r, dtype=dtype, dropout=dropout, act_fn=act_fn, add_bias="c" in tensors
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters(recurse=False):
            parameter.copy_(tensors[name])
    return made


def _kind_of_names(names: set[str], where: str) -> str:
    """The kind that a file's names tell: two pairs of kinds share theirs, and then somebody must say."""
    names = names - _IGNORED
    rotates = any(name.startswith(_ROTATE) for name in names)
    if "rotate_layer" in names:
        return "loreft"
    if rotates and "learned_source.weight" in names:
        return "direft"
    if rotates and "learned_source" in names:
        candidates = "'consreft' or 'lobireft'"
    elif "proj_layer.weight" in names:
        candidates = "'noreft' or 'nodireft'"
    elif names <= {"R", "W", "P", "b", "c"}:
        candidates = "'loreft' or 'direft'" if {"R", "W"} <= names else "the one that was saved"
    else:
        raise CheckpointError(f"{where} is not one of pyreft's interventions: it holds {', '.join(sorted(names)[:6])}")
    raise CheckpointError(
        f"{where} may be one of several kinds, and no config.json says which: give intervention_type={candidates}"
    )


def _ours(state: dict[str, Tensor], kind: str, where: str) -> dict[str, Tensor]:
    """A file's tensors by our names, none missing and none over."""
    orthonormal = INTERVENTIONS[kind].orthonormal
    given = {name for name in state if name not in _IGNORED}
    odd = next((name for name in sorted(given) if state[name].dtype not in _DTYPES), None)
    if odd is not None:
        raise CheckpointError(f"{where}: {odd} ({state[odd].dtype}) holds values of no dtype that an intervention has")
    if ("R" if orthonormal else "P") in given:  # pyreft saved one of our modules
        names = {name: name for name in _NAMES[kind]} | ({"R": "R"} if orthonormal else {})
        rotation: set[str] = set()
    else:
        names = _NAMES[kind]
        rotation = (
            {"rotate_layer"}
            if kind == "loreft"
            else {_ROTATE + "original", _ROTATE + "0.base"}
            if orthonormal
            else set()
        )
    wanted = set(names.values()) | rotation
    optional = {names["c"]} if "c" in names else set()
    if not wanted - optional <= given <= wanted:
        odd = min((wanted - optional - given) | (given - wanted))
        verb = "lacks" if odd in wanted else "holds"
        raise CheckpointError(f"{where} is not a {kind} intervention: it {verb} {odd!r}")
    ours = {name: state[theirs] for name, theirs in names.items() if theirs in given}
    if "rotate_layer" in rotation:
        Q = state["rotate_layer"]
        ours["R"] = Q.T if Q.ndim == 2 else Q
    elif rotation:
        ours["R"] = materialise(state[_ROTATE + "original"], state[_ROTATE + "0.base"], where)
    return ours


def materialise(original: Tensor, base: Tensor, where: str = "the file") -> Tensor:
    """R (r, d) of torch's orthogonal parametrization: original (d, r), base (d, d), in fp64; fp32 unless given as fp64.

    R^T = base . householder_product(tril(original, -1) + 1, tau) . sign, tau_i = 2 / (1 + |column i below the diagonal|^2).
    """
    shaped = original.ndim == 2 and base.ndim == 2 and base.shape[0] == base.shape[1] == original.shape[0]
    if not shaped or original.shape[1] > original.shape[0]:
        raise CheckpointError(
            f"{where}: original has shape {tuple(original.shape)} and base {tuple(base.shape)}; "
            "they must be (d, r) and (d, d)"
        )
    if not bool(torch.isfinite(original).all() and torch.isfinite(base).all()):
        raise CheckpointError(f"{where}: the rotation holds values that are not finite numbers")
    X = original.double()
    A = X.tril(-1)
    tau = 2 / (1 + A.square().sum(0))
    Q = torch.linalg.householder_product(A, tau) * X.diagonal().trunc()
    wide = torch.promote_types(original.dtype, torch.float32)
    return (base.double() @ Q).T.to(wide).contiguous()


def to_tensors(intervention: Intervention) -> dict[str, Tensor]:
    """The tensors that pyreft's class of the same name loads. All but Loreft, Noreft and Nodireft hold a (d, d) matrix."""
    kind = kind_of(intervention)
    ours = {name: p.detach().cpu().contiguous() for name, p in intervention.named_parameters(recurse=False)}
    named = {theirs: ours[name] for name, theirs in _NAMES[kind].items() if name in ours}
    if kind == "loreft":
        return {**named, "rotate_layer": ours["R"].T.contiguous()}
    width = torch.tensor(intervention.embed_dim)
    rotation = {}
    if intervention.orthonormal:
        rotation = _parametrize(ours["R"])
    return {"embed_dim": width, "interchange_dim": width.clone(), **named, **rotation}


def _parametrize(R: Tensor) -> dict[str, Tensor]:
    """``original`` and ``base`` that give R back: no reflection but the signs, and R^T completed to a rotation."""
    r, d = R.shape
    base = torch.linalg.qr(R.T.double(), mode="complete")[0].to(R.dtype)
    base[:, :r] = R.T
    return {_ROTATE + "original": -torch.eye(d, r, dtype=R.dtype), _ROTATE + "0.base": base}


def orthonormality_error(intervention: nn.Module) -> float:
    """max |R R^T - I|; 0 for an intervention without R."""
    held = intervention._parameters.get("R")
    if held is None:
        return 0.0
    R = held.detach().double()
    return float((R @ R.T - torch.eye(R.shape[0], dtype=torch.float64, device=R.device)).abs().max())


@torch.no_grad()
def orthonormalise_(intervention: Intervention) -> None:
    """Give R orthonormal rows without changing the edit: R = H Q with H = (R R^T)^(1/2); R <- Q, W and b follow.

    LoReFT: W <- H (W - R) + Q, b <- H b; DiReFT: W <- H W, b <- H b; LobiReFT: b <- H b. ``ValueError`` for an activation other
    than linear and for ConsReFT, whose edit has no other form, and for an R whose rows are dependent.
    """
    kind = kind_of(intervention)
    if intervention.act_fn not in (None, "linear") or kind not in _ROTATABLE:
        raise ValueError(f"this {kind} with act_fn={intervention.act_fn!r} has no equal with orthonormal rows of R")
    p: dict[str, Tensor] = dict(intervention.named_parameters(recurse=False))
    R = p["R"].double()
    values, vectors = torch.linalg.eigh(R @ R.T)
    if float(values.min()) <= 1e-12 * float(values.max()):
        raise ValueError("the rows of R are linearly dependent, so no orthonormal R gives the same edit")
    H = vectors * values.sqrt() @ vectors.T
    Q = vectors * values.rsqrt() @ vectors.T @ R
    if kind == "loreft":
        p["W"].copy_(H @ (p["W"].double() - R) + Q)
    elif kind == "direft":
        p["W"].copy_(H @ p["W"].double())
    p["b"].copy_(H @ p["b"].double())
    p["R"].copy_(Q)


@torch.no_grad()
def orthonormal_twin(intervention: Intervention) -> Intervention:
    """The LoReFT of a NoReFT, the DiReFT of a NoDiReFT: the same edit with an orthonormal R, at least fp32; others as they are.

    P = L R by QR, and then NoReFT: W <- L^T (W - P) + R, b <- L^T (b - c); NoDiReFT: W <- L^T W, b <- L^T b. ``ValueError``
    for an activation other than linear.
    """
    kind = kind_of(intervention)
    if kind not in _TWINS:
        return intervention
    if intervention.partition:
        raise ValueError(
            f"a {kind} with subspaces has no equal with an orthonormal R that has the same groups of rows; write it as it is, "
            "with keep_type=True"
        )
    if intervention.act_fn not in (None, "linear"):
        raise ValueError(f"this {kind} with act_fn={intervention.act_fn!r} has no equal with an orthonormal R")
    p = {name: value.detach().cpu().double() for name, value in intervention.named_parameters(recurse=False)}
    Q, LT = torch.linalg.qr(p["P"].T)
    if kind == "noreft":
        W, b = LT @ (p["W"] - p["P"]) + Q.T, LT @ (p["b"] - p.get("c", 0))
    else:
        W, b = LT @ p["W"], LT @ p["b"]
    wide = torch.promote_types(intervention._parameters["P"].dtype, torch.float32)  # type: ignore[union-attr]
    made = INTERVENTIONS[_TWINS[kind]](intervention.embed_dim, intervention.r, dtype=wide, dropout=intervention.dropout)
    for name, value in (("R", Q.T), ("W", W), ("b", b)):
        made.get_parameter(name).copy_(value)
    return made
