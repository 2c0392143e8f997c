"""The paper's question, how much pictures help, and ours, whether one model with a CMoE fusion does the work of four: arms, rows, tables.

A row is one arm with one seed: trained, evaluated, and kept as rows/ARM-SEED.json. The same command again goes on where it stopped.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from examples.vnnet import airports, plots
from examples.vnnet.data import FACTORS, SPLITS, UNITS, Tables, Weather, Windows, load
from examples.vnnet.evaluate import (
    Scores,
    attention_on_upwind,
    autoregression,
    climatology,
    forecasts,
    gain,
    gates_by_hour,
    outputs,
    persistence,
    reliance,
    span,
    truth,
)
from examples.vnnet.files import UserError, read_json, write_json, write_text
from examples.vnnet.generate import Settings as Generated
from examples.vnnet.generate import places, stored, upwind
from examples.vnnet.model import Settings, VNNet
from examples.vnnet.train import Plan, load_model, train

FIRST, LAST = 6, 12  # the hours ahead over which vision is judged
GATES = 5  # gates are read at every fifth window, which meets each hour of the day


@dataclass(frozen=True)
class Arm:
    title: str
    data: str = "generated"
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def factors(self) -> tuple[str, ...]:
        return self.changes.get("factors", FACTORS)


ARMS = {
    "nnet": Arm("NNet, no pictures", changes={"vision": False}),
    "cmoe": Arm("VN-Net, one model, CMoE fusion"),
    "airports": Arm("NNet at the airports", "airports", {"vision": False}),
    **{f: Arm(f"VN-Net for {f}, plain fusion", changes={"fusion": "plain", "factors": (f,)}) for f in FACTORS},
    "plain": Arm("VN-Net, one model, plain fusion", changes={"fusion": "plain"}),
    "repository": Arm("VN-Net, repository's version, CMoE fusion", changes={"version": "repository"}),
    "repository-nnet": Arm("NNet, repository's version", changes={"version": "repository", "vision": False}),
}
SEPARATE = FACTORS
BASELINES = ("persistence", "climatology", "linear autoregression")


@dataclass
class Place:
    """One data set, ready for training: windows by split for any factors, and the wind that made it where it was generated."""

    weather: Weather
    tables: Tables
    drift: np.ndarray | None = None
    generated: Generated | None = None

    def windows(self, split: str, settings: Settings) -> Windows:
        return Windows(self.weather, self.tables, split, settings.factors, settings.history, settings.horizon, settings.frames)


def generated_place(seed: int, cache: Path, hours: int = 3000) -> Place:
    made = Generated(hours=hours, seed=seed)
    weather, drift = stored(made, cache)
    return Place(weather, Tables.fit(weather), drift, made)


def airport_place(cache: Path) -> Place:
    weather = airports.read(airports.archive(cache))
    return Place(weather, Tables.fit(weather))


def plan_of(arm: Arm, seed: int, steps: int) -> Plan:
    if arm.data == "airports":
        return Plan(steps=2 * steps, batch=64, seed=seed, validation_windows=876, sampling=12.0)
    return Plan(steps=steps, seed=seed)


def settings_of(arm: Arm, stations: int) -> Settings:
    return Settings.small(stations=stations, **arm.changes)


def measure(name: str, seed: int, out: Path, cache: Path, steps: int, console: Console, hours: int = 3000) -> dict[str, Any]:
    """One row, from its file or made now."""
    path = out / "rows" / f"{name}-{seed}.json"
    arm = ARMS[name]
    if path.is_file():
        row = read_json(path)
        if (row["steps"], row["hours"]) != (steps, hours):
            raise UserError(f"{path}: was made with steps={row['steps']}, hours={row['hours']}; give another --out or the same numbers")
        if row["settings"] != settings_of(arm, row["settings"]["stations"]).state_dict():
            raise UserError(f"{path}: is of a model with other settings than this version's; give another --out")
        return row
    try:
        place = airport_place(cache) if arm.data == "airports" else generated_place(seed, cache, hours)
    except UserError as error:
        if arm.data != "airports":
            raise
        console.print(f"{arm.title}: left out: {error}", style="yellow", markup=False, soft_wrap=True)
        return {}
    settings = settings_of(arm, place.weather.stations.shape[1])
    windows = {split: place.windows(split, settings) for split in SPLITS}
    run = out / "runs" / f"{name}-{seed}"
    plan = plan_of(arm, seed, steps)
    model = train(
        run, settings, plan, windows["train"], windows["validation"], resume=run.exists(), console=console, title=f"{name} {seed}"
    )
    row = {
        "arm": name,
        "seed": seed,
        "steps": steps,
        "hours": hours,
        "cpu_seconds": read_json(run / "time.json")["cpu_seconds"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "settings": settings.state_dict(),
        **evaluated(model, place, windows["test"], windows["train"] if name in ("airports", "nnet") else None),
    }
    write_json(path, row)
    return row


def evaluated(model: VNNet, place: Place, test: Windows, training: Windows | None) -> dict[str, Any]:
    """Scores on all test windows; with pictures also on changed ones; with ``training`` the forecasts without learning beside them."""
    which = np.arange(len(test))
    observed, valid = truth(test, which)
    row: dict[str, Any] = {"scores": {"true": Scores.of(forecasts(model, test, which), observed, valid).lists()}}
    if training is not None:
        fixed = (persistence(test, which), climatology(test, which), autoregression(test, training, which))
        row["baselines"] = {name: Scores.of(values, observed, valid).lists() for name, values in zip(BASELINES, fixed, strict=True)}
    if model.settings.vision:
        for pictures in ("shuffled", "shifted"):
            row["scores"][pictures] = Scores.of(forecasts(model, test, which, pictures), observed, valid).lists()
        some = which[::4]
        if place.drift is not None and place.generated is not None:
            mass, chance = attention_on_upwind(model, test, some, place.drift, places(place.generated))
            row["attention"] = {"mass": mass.tolist(), "chance": chance.tolist()}
        by_hour = gates_by_hour(model, test, which[::GATES])
        row["gates"] = (
            None if by_hour is None else [[[None if np.isnan(g) else float(g) for g in gates] for gates in hours] for hours in by_hour]
        )
    return row


def run(
    out: Path, cache: Path, arms: Sequence[str], seeds: Sequence[int], steps: int, console: Console, hours: int = 3000
) -> dict[tuple[str, int], dict[str, Any]]:
    """All rows, the comparison that matters most first; the tables are rewritten after each."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    groups = [[a for a in arms if a in ("nnet", "cmoe")], [a for a in arms if a == "airports"], [a for a in arms if a in SEPARATE]]
    groups.append([a for a in arms if not any(a in group for group in groups)])
    for group in groups:
        for seed in seeds:
            for name in group:
                row = measure(name, seed, out, cache, steps, console, hours)
                if row:
                    rows[name, seed] = row
                    write_text(out / "table.md", tables(rows, arms, seeds))
    draw(rows, out)
    write_json(out / "table.json", summary(rows))
    return rows


def scores(row: dict[str, Any], pictures: str = "true") -> Scores:
    return Scores.from_lists(row["scores"][pictures])


def _seeds(rows: dict[tuple[str, int], Any], *names: str) -> list[int]:
    """The seeds for which all these arms were run."""
    return sorted(set.intersection(*({seed for arm, seed in rows if arm == name} for name in names)))


def summary(rows: dict[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
    """Per seed, over 6-12 hours ahead, by factor: gain, reliances, attention; and one model against four."""
    result: dict[str, Any] = {"vision": [], "one_against_four": []}
    for seed in _seeds(rows, "nnet", "cmoe"):
        full, without = scores(rows["cmoe", seed]), scores(rows["nnet", seed])
        shuffled, shifted = (scores(rows["cmoe", seed], p) for p in ("shuffled", "shifted"))
        attention = rows["cmoe", seed]["attention"]
        result["vision"].append(
            {
                "seed": seed,
                "gain": span(gain(full, without), FIRST, LAST).tolist(),
                "gain_with_shuffled_pictures": span(gain(shuffled, without), FIRST, LAST).tolist(),
                "vision_reliance": span(reliance(shuffled, full), FIRST, LAST).tolist(),
                "location_reliance": span(reliance(shifted, full), FIRST, LAST).tolist(),
                "attention": float(np.mean(attention["mass"])),
                "attention_by_chance": float(np.mean(attention["chance"])),
            }
        )
    for seed in _seeds(rows, "cmoe", *SEPARATE):
        one, four = rows["cmoe", seed], [rows[f, seed] for f in SEPARATE]
        ratio = [float(np.mean(scores(one).mae[:, i] / scores(row).mae[:, 0])) for i, row in enumerate(four)]
        entry = {
            "seed": seed,
            "error": ratio,
            "parameters": one["parameters"] / sum(row["parameters"] for row in four),
            "time": one["cpu_seconds"] / max(sum(row["cpu_seconds"] for row in four), 1e-9),
        }
        if ("plain", seed) in rows:
            plain = rows["plain", seed]
            entry["plain_error"] = [float(np.mean(scores(plain).mae[:, i] / scores(row).mae[:, 0])) for i, row in enumerate(four)]
        result["one_against_four"].append(entry)
    return result


def _percent(value: float) -> str:
    return f"{100 * value:+.1f} %"


def tables(rows: dict[tuple[str, int], dict[str, Any]], arms: Sequence[str], seeds: Sequence[int]) -> str:
    """Markdown: what was run, the vision's worth, one model against four, errors by horizon, the airports."""
    found, lines = summary(rows), []
    if found["vision"]:
        lines += [
            f"### What pictures are worth: generated data, {FIRST}-{LAST} hours ahead",
            "",
            "Gain is 1 - MAE(VN-Net) / MAE(NNet); mean is over the four factors. Reliance is MAE(changed pictures) / MAE(VN-Net) - 1.",
            "",
            f"| seed | gain, mean | {' | '.join(FACTORS)} | gain, shuffled pictures | vision reliance | location reliance "
            "| attention upwind (chance) |",
            "|---|" + "---|" * (len(FACTORS) + 5),
        ]
        for entry in found["vision"]:
            parts = [str(entry["seed"]), _percent(np.mean(entry["gain"])), *map(_percent, entry["gain"])]
            parts += [_percent(np.mean(entry[key])) for key in ("gain_with_shuffled_pictures", "vision_reliance", "location_reliance")]
            parts.append(f"{entry['attention']:.3f} ({entry['attention_by_chance']:.3f})")
            lines.append(f"| {' | '.join(parts)} |")
        lines.append("")
    if found["one_against_four"]:
        lines += [
            "### One model with a CMoE fusion against four models: generated data, 1-12 hours ahead",
            "",
            "Error is MAE(one model) / MAE(the factor's own model) - 1 over the hours ahead. Parameters and CPU time are shares.",
            "",
            f"| seed | error, mean | {' | '.join(FACTORS)} | parameters | CPU time of training | one model, plain fusion: error, mean |",
            "|---|" + "---|" * (len(FACTORS) + 4),
        ]
        for entry in found["one_against_four"]:
            parts = [str(entry["seed"]), _percent(np.mean(entry["error"]) - 1), *(_percent(v - 1) for v in entry["error"])]
            parts += [f"{100 * entry['parameters']:.0f} %", f"{100 * entry['time']:.0f} %"]
            parts.append(_percent(np.mean(entry["plain_error"]) - 1) if "plain_error" in entry else "not run")
            lines.append(f"| {' | '.join(parts)} |")
        lines.append("")
    for name, title in (("nnet", "generated data"), ("airports", "real data, the three airports")):
        if _seeds(rows, name):
            lines += _by_horizon(rows, name, title)
    missing = [f"{name} seed {seed}" for name in arms for seed in seeds if (name, seed) not in rows]
    lines += [f"Rows measured: {len(rows)}. Rows not run: {', '.join(missing) or 'none'}.", ""]
    return "\n".join(lines)


def _by_horizon(rows: dict[tuple[str, int], dict[str, Any]], name: str, title: str) -> list[str]:
    """MAE of each forecast at some hours ahead, the mean over the seeds."""
    seeds, ahead = _seeds(rows, name), (1, 3, 6, 9, 12)
    lines = [f"### MAE by hours ahead: {title}, mean of {len(seeds)} seed{'s' * (len(seeds) > 1)}", ""]
    lines += [
        f"| factor | forecast | {' | '.join(f'{h} h' for h in ahead)} | RMSE, 1-12 h | MAPE, 1-12 h |",
        "|---|---|" + "---|" * (len(ahead) + 2),
    ]
    others = [a for a in ("nnet", "cmoe", "plain", "repository-nnet", "repository") if _seeds(rows, a)] if name == "nnet" else [name]
    for f, factor in enumerate(FACTORS):
        entries = [(b, [Scores.from_lists(rows[name, s]["baselines"][b]) for s in seeds]) for b in BASELINES]
        entries += [(ARMS[a].title, [scores(rows[a, s]) for s in _seeds(rows, a)]) for a in others]
        if name == "nnet" and _seeds(rows, factor):
            own = [scores(rows[factor, s]) for s in _seeds(rows, factor)]
            entries.append((ARMS[factor].title, own))
        for label, found in entries:
            place = 0 if label == ARMS[factor].title else f
            label += "" if len(found) == len(seeds) else f" ({len(found)} seed{'s' * (len(found) > 1)})"
            mae = np.mean([s.mae[:, place] for s in found], axis=0)
            rmse = np.sqrt(np.mean([s.rmse[:, place] ** 2 for s in found]))
            mape = np.mean([s.mape[:, place] for s in found])
            cells = " | ".join(f"{mae[h - 1]:.2f}" for h in ahead)
            lines.append(f"| {factor}, {UNITS[factor]} | {label} | {cells} | {rmse:.2f} | {mape:.0f} % |")
    return [*lines, ""]


def draw(rows: dict[tuple[str, int], dict[str, Any]], out: Path) -> None:
    lines: dict[str, np.ndarray] = {}
    if seeds := _seeds(rows, "nnet"):
        lines["linear autoregression"] = np.stack([np.asarray(rows["nnet", s]["baselines"]["linear autoregression"]["mae"]) for s in seeds])
        lines["NNet"] = np.stack([scores(rows["nnet", s]).mae for s in seeds])
    if seeds := _seeds(rows, "cmoe"):
        lines["VN-Net"] = np.stack([scores(rows["cmoe", s]).mae for s in seeds])
        lines["VN-Net, shuffled pictures"] = np.stack([scores(rows["cmoe", s], "shuffled").mae for s in seeds])
    if lines:
        plots.study(lines, FACTORS, out / "plot.svg")
    if seeds := _seeds(rows, "airports"):
        real = {b: np.stack([np.asarray(rows["airports", s]["baselines"][b]["mae"]) for s in seeds]) for b in BASELINES}
        plots.study({**real, "NNet": np.stack([scores(rows["airports", s]).mae for s in seeds])}, FACTORS, out / "airports.svg")


def details(model: VNNet, place: Place, test: Windows, folder: Path, without: np.ndarray | None = None, ahead: int = 6) -> None:
    """The plots of one model: forecasts against truth, station map, gates, attention. ``without``: NNet's forecasts of the same windows."""
    which = np.arange(len(test))
    values = forecasts(model, test, which)
    observed, valid = truth(test, which)
    shown = np.where(valid, observed, np.nan)[:240, ahead - 1, 0]
    lines = {"model": values[:240, ahead - 1, 0], "persistence": persistence(test, which[:240])[:, ahead - 1, 0]}
    plots.forecast_against_truth(np.arange(len(shown)), shown, lines, test.factors, ahead, folder / "forecasts.svg")
    by_station = None
    if without is not None:
        errors = [np.where(valid, np.abs(v - observed), 0)[:, FIRST - 1 : LAST].sum(axis=(0, 1)) for v in (values, without)]
        by_station = (1 - errors[0] / errors[1]).mean(axis=-1)
    middle = int(test.starts[len(test) // 2]) + test.history - 1
    plots.station_map(place.weather, by_station, folder / "stations.svg", middle)
    if not model.settings.vision:
        return
    by_hour = gates_by_hour(model, test, which[::GATES])
    if by_hour is not None:
        plots.gates(by_hour, test.factors, folder / "gates.svg")
    if model.settings.version != "paper" or place.weather.pictures is None:
        return
    _, _, out = next(outputs(model, test, np.asarray([len(test) // 2])))
    by_query = out.attention[0].mean(dim=0).unflatten(0, (1 + test.horizon, -1)).unflatten(-1, out.grid).numpy()  # type: ignore[attr-defined]
    hours = (1, test.horizon // 2, test.horizon)
    picture = place.weather.pictures[middle, :, :, 0]
    spots = (place.weather.positions + 1) / 2 * np.asarray(picture.shape[::-1])
    station = int(np.argmin(np.abs(spots - spots.mean(axis=0)).sum(axis=1)))
    air = None if place.drift is None else upwind(place.drift, spots, middle, test.horizon)[[h - 1 for h in hours], station]
    plots.attention(picture, np.stack([by_query[h, station] for h in hours]), spots[station], air, hours, folder / "attention.svg")


def draw_models(out: Path, cache: Path, hours: int) -> None:
    """The demo's plots: the two models on generated data, NNet at the airports."""
    place = generated_place(0, cache, hours)
    models = {name: load_model(out / "runs" / f"{name}-0")[0] for name in ("nnet", "cmoe")}
    test = place.windows("test", models["cmoe"].settings)
    details(models["cmoe"], place, test, out / "plots", forecasts(models["nnet"], test, np.arange(len(test))))
    if (out / "runs" / "airports-0").is_dir():
        real, model = airport_place(cache), load_model(out / "runs" / "airports-0")[0]
        details(model, real, real.windows("test", model.settings), out / "plots" / "airports")


def show(console: Console, rows: dict[tuple[str, int], dict[str, Any]], arms: Sequence[str], seeds: Sequence[int]) -> None:
    """The Markdown tables as tables of the terminal."""
    head: list[str] | None = None
    table = None
    for line in tables(rows, arms, seeds).splitlines():
        if line.startswith("|---"):
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else None
        if cells is None:
            if table is not None:
                console.print(table)
            table = head = None
            if line:
                console.print(line.lstrip("# "), style="bold" if line.startswith("#") else None, markup=False, highlight=False)
        elif head is None:
            head, table = cells, Table(*cells)
        elif table is not None:
            table.add_row(*cells)


def say(console: Console, weather: Weather, parts: Sequence[Windows], zero_is_missing: bool) -> None:
    """What the data holds, and what of it is masked or left out."""
    console.print(
        f"{weather.name}: " + ", ".join(f"{count:,} {what}" for what, count in weather.notes.items()), highlight=False, soft_wrap=True
    )
    for part in parts:
        dropped = f", {part.dropped:,} left out across gaps" if part.dropped else ""
        console.print(f"{part.split}: {len(part):,} windows{dropped}", highlight=False)
    if zero_is_missing:
        lost = [int(((part.y == 0) & part.valid).sum()) for part in parts[:1]]
        console.print(
            f"zero is missing: {lost[0]:,} observed zeros are masked, calm hours and 0 °C among them", style="yellow", highlight=False
        )


def evaluate_own(run: Path, data: Path, validation: float, test: float, console: Console) -> None:
    model, fitted, about = load_model(run)
    weather = load(data, validation, test)
    s = model.settings
    if weather.stations.shape[1] != s.stations:
        raise UserError(
            f"{data}: has {weather.stations.shape[1]} stations, {run} was trained on {s.stations}; give data of the same stations"
        )
    if not np.allclose(weather.positions, model.positions.numpy(), atol=1e-3):  # type: ignore[operator]
        raise UserError(f"{data}: stations lie elsewhere than those {run} was trained on; give data of the same stations in the same order")
    if s.vision and (weather.pictures is None or weather.pictures.shape[3] != s.channels):
        raise UserError(f"{data}: {run} reads pictures of {s.channels} channels; give pictures.npy with as many")
    place = Place(weather, fitted)
    windows, training = place.windows("test", s), place.windows("train", s)
    say(console, weather, [windows], bool(about["plan"]["zero_is_missing"]))
    row = {"settings": s.state_dict(), **evaluated(model, place, windows, training)}
    write_json(run / "scores.json", row)
    table = Table("factor", "forecast", *(f"{h} h" for h in range(1, s.horizon + 1, 2)), "MAE", "RMSE", "MAPE")
    named = [(name, Scores.from_lists(value)) for name, value in row["baselines"].items()]
    named += [({"true": "model"}.get(p, f"model, {p} pictures"), scores(row, p)) for p in row["scores"]]
    for f, factor in enumerate(s.factors):
        for name, found in named:
            by_hour = [f"{found.mae[h - 1, f]:.2f}" for h in range(1, s.horizon + 1, 2)]
            overall = [
                f"{found.mae[:, f].mean():.2f}",
                f"{np.sqrt((found.rmse[:, f] ** 2).mean()):.2f}",
                f"{found.mape[:, f].mean():.0f} %",
            ]
            table.add_row(f"{factor}, {UNITS[factor]}", name, *by_hour, *overall, style="bold" if name == "model" else None)
    console.print(table)
    plots.error_by_horizon({name: found.mae for name, found in named}, s.factors, run / "plots" / "error.svg")
    details(model, place, windows, run / "plots")
    console.print(f"scores and plots: {run}", highlight=False, soft_wrap=True)


def settle(threads: int | None) -> None:
    if threads:
        torch.set_num_threads(threads)
