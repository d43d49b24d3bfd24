"""pyreft's ReftModel over our edits: interventions by pyreft's keys, locations given with every call.

The base model keeps its other hooks, and unlike pyreft's, this one reaches its interventions with train(), eval() and to().
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import optim
from ..interventions import Intervention
from . import checkpoint, components, format, locations
from .checkpoint import Entry
from .config import ReftConfig, Representation
from .format import CheckpointError
from .hooks import Hooks
from .locations import Locations

_SOURCES = "sources are not supported: none of the six interventions has one"


class ReftModel(nn.Module):
    """A base model and its interventions; made by :func:`get_reft_model`.

    ``interventions`` holds them by pyreft's keys, ``reft_config`` is what it was made of, ``config`` the base model's.
    """

    accepts_loss_kwargs = False  # for Trainer: the losses are means

    def __init__(self, config: ReftConfig, model: nn.Module):
        super().__init__()
        self.reft_config, self.model = config, model
        self.representations: list[Representation] = config.built(model)
        places = [components.locate(model, r.layer, r.component) for r in self.representations]
        names = checkpoint.keys([(r.layer, r.component) for r in self.representations])
        self.interventions = nn.ModuleDict(
            {key: r.intervention for key, r in zip(names, self.representations, strict=True)}  # type: ignore[misc]
        )
        self._hooks = Hooks(model, places, list(self.interventions.values()))  # type: ignore[arg-type]
        optim.guard_optimizers()

    @property
    def config(self) -> Any:
        """The base model's configuration, which Trainer reads and writes."""
        return getattr(self.model, "config", None)

    @property
    def device(self) -> torch.device:
        return self.get_device()

    def _located(
        self, base: Any, unit_locations: Any, prompt: bool | None, sources: Any, representations: Any, subspaces: Any
    ) -> Locations:
        if sources is not None or representations is not None:
            raise NotImplementedError(_SOURCES)
        batch = len(next(iter(base.values())))
        where = locations.parse(unit_locations, len(self.interventions), batch, prompt)
        if subspaces is not None:
            where.subspaces = locations.parse_subspaces(subspaces, len(self.interventions), batch)
        return where

    def forward(
        self,
        base: Any,
        sources: Any = None,
        unit_locations: Any = None,
        source_representations: Any = None,
        subspaces: Any = None,
        labels: Tensor | None = None,
        output_original_output: bool = False,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
    ) -> Any:
        """(the plain model's output or None, the edited model's output), as pyreft gives them.

        ``base`` is the model's input as a dict; ``unit_locations`` as in :func:`fastreft.pyreft.locations.parse`; ``subspaces``
        are the rows of R that each sample is edited with, as in :func:`fastreft.pyreft.locations.parse_subspaces`. The plain
        model runs too with ``output_original_output``. ``return_dict`` is taken and makes no difference.
        """
        where = self._located(base, unit_locations, None, sources, source_representations, subspaces)
        original = self._hooks.run(None, self.model, base) if output_original_output else None
        more = {name: value for name, value in (("labels", labels), ("use_cache", use_cache)) if value is not None}
        return original, self._hooks.run(where, self.model, {**base, **more})

    def generate(
        self,
        base: Any,
        sources: Any = None,
        unit_locations: Any = None,
        source_representations: Any = None,
        intervene_on_prompt: bool = False,
        subspaces: Any = None,
        output_original_output: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """(the plain model's text or None, the edited model's): ``model.generate``, beams and batches included.

        With ``intervene_on_prompt`` the locations are columns of the prompt, decode steps are left alone; without it each
        decode step is edited and the prompt is not. No locations and ``intervene_on_prompt`` edit every token.
        """
        if unit_locations is None and not intervene_on_prompt:
            unit_locations = {"base": 0}  # the one column of a decode step
        prompt = intervene_on_prompt if unit_locations is not None else None
        where = self._located(base, unit_locations, prompt, sources, source_representations, subspaces)
        original = self.model.generate(**base, **kwargs) if output_original_output else None  # type: ignore[operator]
        return original, self._hooks.run(where, self.model.generate, {**base, **kwargs})  # type: ignore[arg-type]

    # ---- what a training loop asks for ------------------------------------------------------------------------------

    def set_device(self, device: torch.device | str, set_model: bool = True) -> None:
        """Move the interventions, and the base model too unless told not to."""
        self.interventions.to(device)
        if set_model:
            self.model.to(device)

    def get_device(self) -> torch.device:
        """The base model's device."""
        return next(self.model.parameters()).device

    def disable_model_gradients(self) -> None:
        """Freeze the base model."""
        self.model.eval().requires_grad_(False)

    def enable_model_gradients(self) -> None:
        """Train the base model, too."""
        self.model.train().requires_grad_(True)

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """The interventions' parameters, then the base model's that require a gradient."""
        return [*self.interventions.parameters(), *(p for p in self.model.parameters() if p.requires_grad)]

    def count_parameters(self, include_model: bool = False) -> int:
        """How many numbers train in the interventions, and in the base model where asked for."""
        modules = [self.interventions, self.model] if include_model else [self.interventions]
        return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)

    def print_trainable_parameters(self) -> None:
        """pyreft's two lines."""
        ours, base = self.count_parameters(), sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.model.parameters())
        print(
            f"trainable intervention params: {ours:,d} || trainable model params: {base:,d}\n"
            f"model params: {total:,d} || trainable%: {100 * (ours + base) / total}"
        )

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """The base model's; Trainer calls it for ``gradient_checkpointing=True``."""
        self.model.activation_checkpointing_enable(**kwargs)  # type: ignore[operator]

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The base model's, and its inputs take gradients, which a frozen model needs for it."""
        self.model.gradient_checkpointing_enable(*args, **kwargs)  # type: ignore[operator]

    # ---- files ------------------------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """The interventions and their places, as a checkpoint has them."""
        return [
            Entry(r.layer, r.component, intervention)  # type: ignore[arg-type]
            for r, intervention in zip(self.representations, self.interventions.values(), strict=True)
        ]

    def save(
        self,
        save_directory: str | os.PathLike,
        save_to_hf_hub: bool = False,
        hf_repo_name: str = "my-awesome-model",
        include_model: bool = False,
    ) -> None:
        """A folder that pyreft reads; with ``include_model`` the base model's trainable weights are in it."""
        weights = None
        if include_model:
            weights = {name: p.detach().cpu() for name, p in self.model.named_parameters() if p.requires_grad}
        checkpoint.write(save_directory, self.entries(), weights)
        if save_to_hf_hub:
            from huggingface_hub import HfApi

            HfApi().create_repo(hf_repo_name, exist_ok=True)
            HfApi().upload_folder(repo_id=hf_repo_name, folder_path=str(save_directory))

    def save_intervention(self, save_directory: str | os.PathLike, include_model: bool = True) -> None:
        """What pyreft's trainer writes into a checkpoint; here it is all that :meth:`save` writes."""
        self.save(save_directory, include_model=include_model)

    def load_intervention(self, load_directory: str | os.PathLike, include_model: bool = True) -> None:
        """Weights of a folder into the interventions there are; nothing changes where they do not fit."""
        kinds = {format.kind_of(intervention) for intervention in self.interventions.values()}
        entries = checkpoint.read(load_directory, intervention_type=kinds.pop() if len(kinds) == 1 else None)
        weights = model_weights(load_directory, self.model) if include_model else {}
        mine = {components.locate(self.model, r.layer, r.component): [] for r in self.representations}  # type: ignore[var-annotated]
        for representation, intervention in zip(self.representations, self.interventions.values(), strict=True):
            mine[components.locate(self.model, representation.layer, representation.component)].append(intervention)
        pairs = []
        for entry in entries:
            component = components.unflatten(self.model, entry.component) if entry.flat else entry.component
            waiting = mine.get(components.locate(self.model, entry.layer, component))
            if not waiting:
                raise CheckpointError(
                    f"'{load_directory}' has an intervention at {component} that this model does not have"
                )
            pairs.append((waiting.pop(0), entry.intervention))
        if any(mine.values()):
            raise CheckpointError(f"'{load_directory}' lacks interventions that this model has")
        for held, read in pairs:
            if _shape(held) != _shape(read):
                raise CheckpointError(f"'{load_directory}' holds {read}, where this model has {held}")
        with torch.no_grad():
            for held, read in pairs:
                held.load_state_dict(read.state_dict(), strict=False)
            self.model.load_state_dict(weights, strict=False)

    @staticmethod
    def load(
        load_directory: str | os.PathLike,
        model: nn.Module,
        local_directory: str | None = None,
        from_huggingface_hub: bool = False,
        include_model: bool = False,
        *,
        act_fn: str | None = None,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        intervention_type: str | None = None,
        orthonormalise: bool = False,
    ) -> ReftModel:
        """A saved folder of any layout, or one of the hub where there is no such folder.

        The keywords are :func:`fastreft.pyreft.load`'s, for what pyreft's files do not say.
        """
        if from_huggingface_hub or not Path(load_directory).expanduser().exists():
            from huggingface_hub import snapshot_download

            load_directory = snapshot_download(repo_id=str(load_directory), local_dir=local_directory)
        entries = checkpoint.read(
            load_directory,
            intervention_type=intervention_type,
            act_fn=act_fn,
            dropout=dropout,
            dtype=dtype,
            orthonormalise=orthonormalise,
        )
        weights = model_weights(load_directory, model) if include_model else {}
        representations = []
        for entry in entries:
            component = components.unflatten(model, entry.component) if entry.flat else entry.component
            components.locate(model, entry.layer, component)
            representations.append(
                {
                    "layer": entry.layer or 0,
                    "component": component,
                    "low_rank_dimension": entry.intervention.r,
                    "intervention": entry.intervention,
                }
            )
        made = get_reft_model(model, ReftConfig(representations))
        made.model.load_state_dict(weights, strict=False)
        return made


def _shape(intervention: Intervention) -> tuple[Any, ...]:
    """What two interventions must share for one to take the other's weights."""
    shapes = {name: tuple(p.shape) for name, p in intervention.named_parameters(recurse=False)}
    return format.kind_of(intervention), shapes


def model_weights(folder: str | os.PathLike, model: nn.Module) -> dict[str, Tensor]:
    """The base model's weights of a checkpoint, checked against the model; none where there is no such file."""
    path = checkpoint.find(folder) / checkpoint.MODEL_WEIGHTS
    if not path.is_file():
        return {}
    weights = format.read_tensors(path, empty=True)
    own = dict(model.named_parameters())
    for name, value in weights.items():
        if name not in own or own[name].shape != value.shape:
            raise CheckpointError(
                f"'{path.name}' holds {name} {tuple(value.shape)}, which {type(model).__name__} does not have"
            )
    return weights


def get_reft_model(
    model: nn.Module, reft_config: ReftConfig, set_device: bool = True, disable_model_grads: bool = True
) -> ReftModel:
    """A :class:`ReftModel`: the base model frozen, and the interventions on its device, unless told not to."""
    made = ReftModel(reft_config, model)
    if set_device:
        made.set_device(made.get_device(), set_model=False)
    if disable_model_grads:
        made.disable_model_gradients()
    return made
