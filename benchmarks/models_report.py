"""The tables of ``python -m benchmarks.experts_models``, for benchmarks.report."""

from typing import Any

from benchmarks import machine
from benchmarks.digits import days, milliseconds, ratio_text

Record = dict[str, Any]

SUITE = "experts_models"
STEPS = {"forward": "forward", "train": "training step"}
PEERS = ("eager", "batched_mm", "grouped_mm")


def cells(document: Record) -> list[Record]:
    """Forward before training, fewer tokens first."""
    return sorted(document["cases"].values(), key=lambda c: (list(STEPS).index(c["step"]), c["tokens"]))


def best(case: Record) -> str:
    """The fastest of the others."""
    return min(case["peers"], key=lambda name: case["peers"][name]["ratio"])


def losses(document: Record) -> list[str]:
    """Every comparison in which ours is slower."""
    return [
        f"{STEPS[case['step']]}, T = {case['tokens']}: {ratio_text(peer['ratio'])} of {name}"
        for case in cells(document)
        for name, peer in case["peers"].items()
        if peer["ratio"] < 1
    ]


def about(document: Record) -> str:
    """Machine, runs and model."""
    runs = [case["run"] for case in cells(document)]

    def distinct(name: str) -> str:
        return " and ".join(sorted({str(run[name]) for run in runs}))

    layers = {case["step"]: case["layers"] for case in cells(document)}
    depth = " and ".join(f"{n} layers ({STEPS[step]})" for step, n in layers.items())
    return (
        f"Qwen3-MoE in the width of its 30B-A3B (128 experts of 768, 8 chosen, model width 2048, bf16), {depth}: "
        f"{document['machine']['cpu']}, {document['threads']} threads, torch {distinct('torch')}, transformers {distinct('transformers')}, "
        f"commit {distinct('commit')}, {days([run['date'] for run in runs])}; `cmoe` was served by the {distinct('served_by')} "
        f"backend. {machine.memory_of(document['machine'])}"
    )


def headline(document: Record) -> str:
    """README's table: against the fastest of the others, by tokens."""
    tokens = sorted({case["tokens"] for case in cells(document)})
    at = {(case["step"], case["tokens"]): case for case in cells(document)}
    lines = ["| a whole model | " + " | ".join(f"T = {t}" for t in tokens) + " |", "|---|" + "---|" * len(tokens)]
    for step in dict.fromkeys(case["step"] for case in cells(document)):
        row = []
        for t in tokens:
            case = at.get((step, t))
            row.append("" if case is None else f"{ratio_text(case['peers'][best(case)]['ratio'])} {best(case)}")
        lines.append(f"| {STEPS[step]}: cmoe against the fastest of {', '.join(PEERS)} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def readme(documents: list[Record]) -> str:
    """A short paragraph and table per machine; nothing where nothing was measured."""
    parts = []
    for document in documents:
        lost, compared = losses(document), sum(len(case["peers"]) for case in cells(document))
        parts += [
            '`experts_implementation="cmoe"` under a model of transformers, decoding (T = 1, behind a cache) and prefill. '
            + about(document),
            headline(document),
            f"Ours is slower in {len(lost)} of {compared} comparisons (docs/benchmarks.md).",
        ]
    return "\n\n".join(parts)


def markdown(documents: list[Record]) -> list[str]:
    """The section of docs/benchmarks.md."""
    if not documents:
        return []
    parts = [
        "## MoE models of transformers",
        '`python -m benchmarks.experts_models`: `experts_implementation="cmoe"` against transformers\' own. T = 1 is a decoding step '
        "behind a cache of 128 tokens (in training one token without a cache), more are a prefill; a training step is forward and backward "
        "with every gradient. The whole model is timed, with attention, router and head. All sides take turns; ratios as above.",
    ]
    for document in documents:
        parts.append(about(document))
        lines = [
            "| step | T | cmoe, p50 ms | p20 to p80 | " + " | ".join(f"{peer}, ms | ratio" for peer in PEERS) + " |",
            "|---" * (4 + 2 * len(PEERS)) + "|",
        ]
        for case in cells(document):
            ours, row = case["ours"], []
            for name in PEERS:
                peer = case["peers"].get(name)
                row.append(" | " if peer is None else f"{milliseconds(peer['p50_ms'])} | {ratio_text(peer['ratio'])}")
            spread = f"{milliseconds(ours['p20_ms'])} to {milliseconds(ours['p80_ms'])}"
            lines.append(f"| {STEPS[case['step']]} | {case['tokens']} | {milliseconds(ours['p50_ms'])} | {spread} | {' | '.join(row)} |")
        parts.append("\n".join(lines))
        lost = losses(document)
        parts.append(f"Ours is slower in {len(lost)}" + (": " + "; ".join(lost) + "." if lost else "."))
        left = {
            f"{name}: {why} ({STEPS[case['step']]}, T = {case['tokens']})"
            for case in cells(document)
            for name, why in case["skipped"].items()
        }
        if left:
            parts.append("Not timed: " + "; ".join(sorted(left)) + ".")
        if "lora" in document:
            parts.append(lora(document["lora"]))
    return parts


def lora(found: Record) -> str:
    """What LoRA on the experts costs in memory."""
    weights = found["weights_bytes"] / 2**20

    def times(value: int) -> str:
        return f"{value / 2**20:.0f} MiB ({value / found['weights_bytes']:.1f} times the experts' weights)"

    under = ", ".join(f"{times(peak)} under {name}" for name, peak in found["lora_peak_bytes"].items())
    return (
        f"LoRA of rank {found['rank']} on the 3-D weights of one layer ({found['experts']} experts, {weights:.0f} MiB), by peft, a "
        f"training step of {found['tokens']} tokens: at its peak it needs {under}; with frozen experts and no adapter, "
        f"{times(found['frozen_peak_bytes'])}. peft builds W + ΔW of all experts in each forward pass, whichever implementation runs."
    )
