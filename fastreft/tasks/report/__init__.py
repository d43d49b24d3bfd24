"""``fastreft report``: one page, a file by itself, of how an adapter was trained and what it does to its model."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import torch

from ...files import check_writable, staged
from ..edited import pieces
from ..errors import UserError, user_errors
from ..flags.report import ReportArguments
from ..models import reft_config
from ..places import ADAPTER_WEIGHTS
from ..run_log import read_log
from ..sets.registry import GENERATE
from ..trained import Trained, load_trained
from . import measured, samples

PAGE = "report.html"
MOST_TOKENS = 48  # across a picture


def run(arguments: ReportArguments) -> int:
    """Write the page; everything is checked before."""
    try:
        from . import charts
    except ImportError as error:
        raise UserError("report needs matplotlib: pip install 'fastreft[report]'") from error
    folder = Path(arguments.adapter).expanduser()
    output = folder / PAGE if arguments.output is None else Path(arguments.output).expanduser()
    with user_errors(OSError, prefix=f"cannot write '{output}': "):
        check_writable(str(output.parent))
    config = reft_config(arguments.adapter)
    chosen, about = samples.pick(
        arguments.adapter, arguments.prompt, read_log(folder), arguments.records, arguments.data_dir
    )
    trained = load_trained(
        arguments.adapter, arguments.model, dtype=arguments.dtype, trust_remote_code=arguments.trust_remote_code
    )
    model, log = trained.model, trained.log
    page = {
        "title": f"{config.intervention_type}, rank {config.r}, on {_short(config.base_model_name_or_path)}",
        "subtitle": f"{log.get('task') or 'records of a file'}, positions {config.positions}, {folder.name}",
        "scores": _scores(log),
        "curves": _curves(log, charts),
        "notes": log.get("notes", []),
        "settings": _settings(config, log),
        **_looked_at(trained, chosen, about, arguments.max_new_tokens, charts),
        **_overlap(model, charts),
        "facts": _facts(model, folder, log),
    }
    from jinja2 import Environment

    with user_errors(OSError, prefix=f"cannot write '{output}': "), staged(output.parent, last=output.name) as staging:
        template = Environment(autoescape=True).from_string((Path(__file__).parent / "page.html").read_text("utf-8"))
        (staging / output.name).write_text(template.render(page), encoding="utf-8")
    print(f"wrote {output}")
    return 0


def _short(name: Any) -> str:
    return Path(str(name)).name if Path(str(name)).is_absolute() else str(name)


def _looked_at(trained: Trained, chosen: Any, about: str, most: int, charts: Any) -> dict[str, Any]:
    """What is shown of the texts: before and after, the edits by layer and token, their directions."""
    if not chosen:
        return {"no_samples": about}
    model, tokenizer, kind, labels = trained.model, trained.tokenizer, trained.kind, trained.labels
    chat = bool(trained.log.get("chat"))
    texts = [samples.token_ids(record, tokenizer, kind, chat) for record in chosen]
    if not all(texts):
        raise UserError("a text to look at has no token; give others with --prompt")
    after = samples.written(model, tokenizer, texts, kind, labels, most)
    with samples.without_edits(model):
        before = samples.written(model, tokenizer, texts, kind, labels, most)
    edits = [measured.edits_of(model, ids, kind == GENERATE) for ids in texts]
    shown = []
    for record, ids, one, other, edit in zip(chosen, texts, before, after, edits, strict=True):
        rows = [("without the edits", one), ("with them", other)]
        answer = samples.answer_of(record, labels)
        tokens = list(zip(pieces(tokenizer, ids), (edit.share.amax(0) > 0).tolist(), strict=True))
        shown.append({"tokens": tokens, "written": rows + ([("the record's own", answer)] if answer else [])})
    names = measured.names_of(model)
    columns = torch.nonzero(edits[0].share.amax(0) > 0).flatten().tolist()
    cut = [*columns[: MOST_TOKENS // 2], *columns[-MOST_TOKENS // 2 :]] if len(columns) > MOST_TOKENS else columns
    means = [torch.cat([edit.share[i][edit.share[i] > 0] for edit in edits]) for i in range(len(names))]
    page: dict[str, Any] = {"samples": shown, "samples_are": about}
    page["directions"] = measured.directions(model, tokenizer, edits)
    averages = [(i, float(mean.mean())) for i, mean in enumerate(means) if len(mean)]
    if len(averages) > 1:
        page["by_layer"] = charts.curves({"": averages}, "|edit| / |h|", xlabel="edited layer, by its place")
    page["cut"] = f" (the first and the last {MOST_TOKENS // 2} edited tokens)" if cut != columns else ""
    if cut:
        across = [f"{tokenizer.decode([texts[0][i]])!r} {i}" for i in cut]
        page["edits"] = charts.heat(edits[0].share[:, cut], across, names, "|edit| / |h|", "token", "layer")
    return page


def _overlap(model: Any, charts: Any) -> dict[str, Any]:
    found = measured.overlaps(model)
    pairs = [float(found[i, j]) for i in range(len(found)) for j in range(i)]
    if not pairs:
        return {}
    edits = measured.interventions_of(model)
    names = [name for name, _ in edits]
    found.fill_diagonal_(float("nan"))  # the same with the same, beside which all else would be pale
    return {
        "overlap": charts.heat(found, names, names, "overlap", "layer", "layer"),
        "chance": f"{edits[0][1].r / edits[0][1].embed_dim:.3f}",
        "median": f"{median(pairs):.3f}",
        "most": f"{max(pairs):.3f}",
    }


def _curves(log: dict[str, Any], charts: Any) -> list[tuple[Any, str]]:
    """Pictures of a training's log: losses, what else the evaluations measured, the rate."""
    history = [row for row in log.get("history", []) if isinstance(row.get("step"), (int, float))]

    def points(name: str) -> list[tuple[float, float]]:
        return [(row["step"], row[name]) for row in history if isinstance(row.get(name), (int, float))]

    found = []
    losses = {name: drawn for name, key in (("training", "loss"), ("held out", "eval_loss")) if (drawn := points(key))}
    if losses:
        found.append((charts.curves(losses, "loss"), "loss against step"))
    for name in ("accuracy", "matthews", "f1", "pearson", "entity_f1", "token_accuracy"):
        if len(drawn := points(f"eval_{name}")) > 1:
            found.append((charts.curves({name: drawn}, name), f"{name} against step"))
    if drawn := points("learning_rate"):
        found.append((charts.curves({"learning rate": drawn}, "learning rate"), "learning rate against step"))
    if drawn := points("grad_norm"):
        found.append((charts.curves({"gradient": drawn}, "gradient norm", log=True), "gradient norm against step"))
    return found


def _scores(log: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    rows = []
    for name, values in (log.get("scores") or {}).items():
        metrics = ", ".join(f"{k} {v:.2f}" for k, v in values.items() if k not in ("records", "unparsed"))
        rows.append((name, metrics, f"{values.get('records', 0):,}", f"{values.get('unparsed', 0):,}"))
    return rows


def _facts(model: Any, folder: Path, log: dict[str, Any]) -> list[tuple[str, str]]:
    """Parameters and cost."""
    edits = [edit for _, edit in measured.interventions_of(model)]
    total = sum(p.numel() for name, p in model.named_parameters() if ".reft." not in name)
    of_edits = sum(p.numel() for edit in edits for p in edit.parameters())
    facts = [
        ("numbers of the edits", f"{of_edits:,}"),
        (f"of the model's {total / 1e6:,.1f} M", f"{of_edits / total:.4%}"),
        ("edited modules", f"{len(measured.names_of(model))}"),
        ("the adapter's file", f"{(folder / ADAPTER_WEIGHTS).stat().st_size / 2**10:,.0f} KiB"),
        (
            "multiply-adds an edited token, all layers",
            f"{sum(2 * edit.r * edit.embed_dim for edit in edits) / 1e3:,.0f} k",
        ),
    ]
    if "steps" in log:
        facts.append(("steps", f"{log['steps']:,}"))
        facts.append(("training", f"{log['train_seconds']:,.0f} s"))
        facts.append(("most memory in it", f"{log['peak_memory_bytes'] / 2**20:,.0f} MiB"))
    return facts


def _settings(config: Any, log: dict[str, Any]) -> list[tuple[str, Any]]:
    of_adapter = {
        name: value
        for name, value in config.to_dict().items()
        if value not in (None, [], {}) and name not in ("peft_type", "inference_mode", "peft_version")
    }
    rows: list[tuple[str, Any]] = [(name, _short(value)) for name, value in sorted(of_adapter.items())]
    rows += [
        (name, log[name]) for name in ("learning_rate", "train_records", "dtype", "max_length", "chat") if name in log
    ]
    return rows + [(f"version of {name}", value) for name, value in log.get("versions", {}).items()]
