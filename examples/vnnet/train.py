"""Training that a kill does not hurt: the same bits whether it ran through or was resumed.

Each step's randomness comes from (seed, step) and nothing else, and a checkpoint holds all that the next step reads. A run is a folder:

    last.pt    model, optimizer, step, losses: where --resume goes on
    best.pt    model, tables and settings of the best validation error: what evaluation reads
    done.json  the history; exists only once training has ended
    time.json  CPU seconds of training, over all its stops and resumptions
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from examples.vnnet.data import Batch, Tables, Windows, targets
from examples.vnnet.files import UserError, read_json, read_tensors, write_json, write_tensors
from examples.vnnet.model import Settings, VNNet, build

# For tests of kills: called after each step with its number.
after_step: Callable[[int], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to train. ``zero_is_missing`` masks targets that are exactly 0, as the release does; it loses every calm hour and 0 °C."""

    steps: int = 400
    batch: int = 32
    rate: float = 6e-3
    warmup: int = 20
    clip: float = 1.0
    validate_every: int = 65
    patience: int = 6  # validations without a better one
    sampling: float = 12.0  # c of c / (c + exp(step / c)); 2000 in the release
    validation_windows: int = 256
    checkpoint_every: int = 65
    zero_is_missing: bool = False
    seed: int = 0


def truth_share(step: int, c: float) -> float:
    """Scheduled sampling: how often the truth is fed, falling from nearly 1 to 0 over some multiples of c."""
    return c / (c + math.exp(min(step / c, 700.0)))


def rate(step: int, plan: Plan) -> float:
    """Warm-up, then half a cosine to a twentieth."""
    if step < plan.warmup:
        return plan.rate * (step + 1) / plan.warmup
    way = (step - plan.warmup) / max(plan.steps - plan.warmup, 1)
    return plan.rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(way, 1.0))))


def mask(batch: Batch, plan: Plan) -> Tensor:
    return batch.valid & (batch.y != 0) if plan.zero_is_missing else batch.valid


def masked_loss(values: Tensor, batch: Batch, scale: Tensor, keep: Tensor) -> Tensor:
    """MAE in physical units over the training deviation of each factor, so that factors of different units weigh alike."""
    physical = values * scale[1] + scale[0]
    error = (physical - batch.y).abs() / scale[1] * keep
    return error.sum() / keep.sum().clamp(min=1)


def scale_of(tables: Tables, factors: tuple[str, ...]) -> Tensor:
    """(2, F): mean and deviation of each factor."""
    columns = targets(factors)
    return torch.from_numpy(np.stack([tables.mean[columns], tables.deviation[columns]]))


def order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, 7, epoch]).permutation(count)


def chosen(seed: int, step: int, size: int, count: int) -> np.ndarray:
    """The windows of a step: each epoch is a new order, and a short rest is left to the next one."""
    size = min(size, count)
    per_epoch = count // size
    epoch, place = divmod(step, per_epoch)
    return order(seed, epoch, count)[place * size : (place + 1) * size]


def bar(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
    )


def train(
    run: Path,
    settings: Settings,
    plan: Plan,
    training: Windows,
    validation: Windows,
    resume: bool = False,
    console: Console | None = None,
    title: str = "training",
) -> VNNet:
    """Trains, or goes on; returns the best model. A finished run is read, not trained again."""
    console = console or Console(quiet=True)
    wanted = {"settings": settings.state_dict(), "plan": asdict(plan)}
    if run.exists() and any(run.iterdir()):
        if not resume:
            raise UserError(f"{run}: holds a run; resume it, or give another folder")
        stored = read_json(run / "run.json")
        if stored != wanted:
            part = next(p for p in wanted if stored.get(p) != wanted[p])
            key = next((k for k in wanted[part] if stored.get(part, {}).get(k) != wanted[part][k]), "?")
            was, now = stored.get(part, {}).get(key), wanted[part].get(key)
            raise UserError(f"{run}: was begun with {key}={was!r}, now {now!r}; resume with the same settings, or give another folder")
        if (run / "done.json").is_file():
            return load_model(run)[0]
    for stale in run.glob(".*.partial"):  # of a write that was killed
        stale.unlink()
    write_json(run / "run.json", wanted)
    spent = read_json(run / "time.json")["cpu_seconds"] if resume and (run / "time.json").is_file() else 0.0
    began = time.process_time()

    torch.manual_seed(plan.seed)
    model = build(settings, torch.from_numpy(training.weather.positions), targets(settings.factors))
    optimizer = torch.optim.Adam(model.parameters(), plan.rate, eps=1e-6)
    state: dict[str, Any] = {"step": 0, "best": math.inf, "since": 0, "history": [], "total": 0.0, "count": 0}
    if resume and (run / "last.pt").is_file():
        saved = read_tensors(run / "last.pt")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
    scale = scale_of(training.tables, settings.factors)
    probe = np.linspace(0, len(validation) - 1, min(plan.validation_windows, len(validation))).astype(int)

    lines = max(plan.steps // 5, 1)
    with bar(console) if console.is_terminal else nullcontext() as progress:
        task = progress.add_task(title, total=plan.steps, completed=state["step"], note="") if progress else None
        while state["step"] < plan.steps and state["since"] < plan.patience:
            step = state["step"]
            loss = _step(model, optimizer, step, plan, training, scale)
            if not math.isfinite(loss):
                raise UserError(f"{run}: the loss of step {step} is {loss}; train with a smaller rate than {plan.rate}")
            state["step"], state["total"], state["count"] = step + 1, state["total"] + loss, state["count"] + 1
            if state["step"] % plan.validate_every == 0 or state["step"] == plan.steps:
                error = validate(model, validation, probe, scale, plan)
                state["history"].append([state["step"], state["total"] / state["count"], error])
                state["total"], state["count"] = 0.0, 0
                if error < state["best"]:
                    state["best"], state["since"] = error, 0
                    save_model(run / "best.pt", model, training.tables, {**wanted, "step": state["step"], "error": error})
                else:
                    state["since"] += 1
            if state["step"] % plan.checkpoint_every == 0 or state["step"] == plan.steps or state["since"] >= plan.patience:
                write_json(run / "time.json", {"cpu_seconds": round(spent + time.process_time() - began, 1)})
                write_tensors(run / "last.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state})
            note = f"loss {loss:.3f}" + (f", validation {state['history'][-1][2]:.3f}" if state["history"] else "")
            if progress is not None and task is not None:
                progress.update(task, completed=state["step"], note=note)
            elif state["step"] % lines == 0:
                console.print(f"{title}: step {state['step']} of {plan.steps}, {note}", highlight=False, soft_wrap=True)
            if after_step is not None:
                after_step(state["step"])
    write_json(run / "done.json", {"steps": state["step"], "best": state["best"], "history": state["history"]})
    return load_model(run)[0]


def _step(model: VNNet, optimizer: torch.optim.Optimizer, step: int, plan: Plan, training: Windows, scale: Tensor) -> float:
    torch.manual_seed(plan.seed * 1_000_003 + step)  # dropout
    for group in optimizer.param_groups:
        group["lr"] = rate(step, plan)
    batch = training.batch(chosen(plan.seed, step, plan.batch, len(training)))
    draws = np.random.default_rng([plan.seed, 8, step]).random(training.horizon)
    use_truth = torch.from_numpy(draws < truth_share(step, plan.sampling))
    keep = mask(batch, plan)
    # A missing truth is never fed: its place holds the mean.
    truth = torch.where(batch.valid, (batch.y - scale[0]) / scale[1], 0.0)
    model.train()
    out = model(batch.x, batch.time, batch.pictures, truth, use_truth)
    loss = masked_loss(out.values, batch, scale, keep)
    optimizer.zero_grad(set_to_none=True)
    (loss + out.aux_loss).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def validate(model: VNNet, windows: Windows, which: np.ndarray, scale: Tensor, plan: Plan) -> float:
    model.eval()
    total, count = 0.0, 0.0
    for part in np.array_split(which, -(-len(which) // 128)):
        batch = windows.batch(part)
        keep = mask(batch, plan)
        n = keep.sum().item()
        total += masked_loss(model(batch.x, batch.time, batch.pictures).values, batch, scale, keep).item() * n
        count += n
    return total / max(count, 1)


def save_model(path: Path, model: VNNet, tables: Tables, about: dict[str, Any]) -> None:
    write_tensors(path, {"model": model.state_dict(), "tables": tables.state(), "about": about})


def load_model(run: Path) -> tuple[VNNet, Tables, dict[str, Any]]:
    """The best model of a run, its normalisation tables, and how it was made."""
    if not (run / "best.pt").is_file():
        raise UserError(f"{run}: holds no best.pt; train first, for as many steps as one validation takes")
    saved = read_tensors(run / "best.pt")
    try:
        settings = Settings(**saved["about"]["settings"])
        model = build(settings, saved["model"]["positions"], targets(settings.factors))
        model.load_state_dict(saved["model"])
        return model.eval(), Tables.from_state(saved["tables"]), saved["about"]
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise UserError(f"{run / 'best.pt'}: not a model of this version ({str(error).splitlines()[0][:100]}); train again") from None
