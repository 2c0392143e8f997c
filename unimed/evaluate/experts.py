"""What the experts of a Med-MoE run do on held-out images: who uses which, how often the router is right, and what a layer costs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from unimed import io
from unimed.errors import NoItems, UserError
from unimed.inference.files import MODEL_FOLDER, RECIPE_FILE
from unimed.train import machine, stages
from unimed.train import recipe as recipes
from unimed.train import run as training
from unimed.train.folder import Run

EXPERTS_FILE = "experts.json"
OURS, LOOP, EINSUM, DENSE = "sparse_experts", "loop over experts", "einsum with capacity", "dense FFN"


def measure(run: Path, overrides: list[str] | None = None, limit: int = 400, repeats: int = 7) -> dict[str, Any]:
    """Writes experts.json of a run of stage 3 and returns what it holds.

    use, accuracy: as of `routing`. labels: the router's accuracy by the number of its labels, as stage 2 measured it. cost: of a training
    step of the first layer on the tokens of one batch, by form.
    """
    result, (model, processor, found) = _routing_of(run, overrides, limit)
    before = Run(recipes.load(run / RECIPE_FILE).source).domains / stages.DOMAINS_FILE
    result["labels"] = io.read_json(before).get("labels", {}) if before.is_file() else {}
    result |= {"cost": _cost(model, processor, found[: stages.BATCH], repeats), "machine": machine.describe()}
    io.write_json(run / EXPERTS_FILE, result)
    return result


def routing(run: Path, overrides: list[str] | None = None, limit: int = 400) -> dict[str, Any]:
    """Use and accuracy by split of a run of stage 3, on at most `limit` images each.

    use: by domain and layer, the share of tokens whose first choice is each expert. accuracy: of tokens in all layers; of those from the
    image on, since those before it have not read it; of samples by the mean of their tokens' logits; and the share of the most frequent
    domain.
    """
    return _routing_of(run, overrides, limit)[0]


def _routing_of(run: Path, overrides: list[str] | None, limit: int) -> tuple[dict[str, Any], Any]:
    from unimed.models.load import load
    from unimed.models.medmoe import moe_layers

    recipe = recipes.load(run / RECIPE_FILE, overrides)
    if recipe.medmoe is None or recipe.medmoe.stage != 3 or recipe.medmoe.dense:
        raise UserError(f"{run}: not a run of stage 3 of Med-MoE with experts; train one with: unimed demo --model medmoe")
    model, processor = load(run / MODEL_FOLDER)
    model.eval()
    names, splits = list(recipe.medmoe.domains), {}
    found: list[Any] = []
    for split in recipe.evaluate.splits:
        try:
            items = training.items(recipe, split)
        except NoItems:
            continue
        if found := stages.labelled(recipe.medmoe, items, limit, recipe.train.seed):
            splits[split] = _routing(model, processor, found, names)
    if not splits:
        raise UserError(f"{run}: no image of {', '.join(names)} in {', '.join(recipe.evaluate.splits)}")
    return {"domains": names, "meta": recipe.medmoe.meta, "layers": list(moe_layers(model)), "splits": splits}, (model, processor, found)


def _routing(model: Any, processor: Any, found: list[Any], names: list[str]) -> dict[str, Any]:
    import torch

    from unimed.models.medmoe import moe_layers, record_routing

    experts, layers = len(names), len(moe_layers(model))
    counts = torch.zeros(experts, layers, experts, dtype=torch.float64)
    right, reading, read_right = 0, 0, 0
    with torch.no_grad(), record_routing(model) as records:
        for inputs, labels in stages.batches(model, processor, found):
            model(**inputs)
            mask = inputs["attention_mask"].bool()
            reads = (inputs["input_ids"] == processor.image_token_id).cumsum(1) > 0
            for row, label in enumerate(labels.tolist()):
                mean = torch.zeros(experts, device=mask.device)
                for layer, record in enumerate(records):
                    first = record.indices[row, mask[row], 0]
                    counts[label, layer] += torch.bincount(first, minlength=experts).double().cpu()
                    of_image = record.indices[row, mask[row] & reads[row], 0] == label
                    reading, read_right = reading + of_image.numel(), read_right + int(of_image.sum())
                    mean += record.logits[row, mask[row]].mean(0)
                right += int(mean.argmax()) == label
            records.clear()
    labels_of = [label for _, label in found]
    tokens = counts.sum()
    return {
        "images": len(found),
        "use": {name: (counts[place] / counts[place].sum(1, keepdim=True).clamp(min=1)).tolist() for place, name in enumerate(names)},
        "accuracy": {
            "tokens": float(sum(counts[place, :, place].sum() for place in range(experts)) / tokens),
            "tokens from the image on": read_right / max(reading, 1),
            "samples": right / len(found),
            "majority": max(map(labels_of.count, set(labels_of))) / len(found),
        },
    }


def _cost(model: Any, processor: Any, found: list[Any], repeats: int) -> dict[str, Any]:
    """Median milliseconds of forward and backward, taken in turn, and bytes that the forward keeps."""
    import torch

    from unimed.models.medmoe import forms, moe_layers

    layer = next(iter(moe_layers(model).values()))
    read: list[Any] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].detach()))
    inputs, _ = next(stages.batches(model, processor, found))
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        hook.remove()
    x = read[0].flatten(0, 1).clone().requires_grad_(True)
    weights, indices = (t.detach() for t in layer._choose(layer.router(x)))
    parameters = [p.requires_grad_(True) for p in layer.parameters(recurse=False)]
    other = {LOOP: forms.loop, EINSUM: forms.einsum, DENSE: forms.dense_ffn}
    calls: dict[str, Any] = {OURS: lambda: layer(x)}
    calls |= {name: (lambda form=form: form(layer, x, weights, indices)) for name, form in other.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):  # the first one warms up
        for name, call in calls.items():
            start = time.perf_counter()
            y = call()
            torch.autograd.grad(y, [x, *parameters], torch.ones_like(y), allow_unused=True)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    given = [x, *parameters]
    kept = {name: forms.bytes_kept(call, given) for name, call in calls.items()}
    return {
        "tokens": len(x),
        "width": x.shape[1],
        "forms": {name: {"ms": 1e3 * sorted(times)[len(times) // 2], "bytes_kept": kept[name]} for name, times in seconds.items()},
    }
