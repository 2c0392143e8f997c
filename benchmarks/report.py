"""Plots and tables of the results in benchmarks/results/.

``python -m benchmarks.report`` (``make bench-report``) writes the six rows between README's markers; ``make docs`` writes the page
with every row, and two plots per machine. The same JSON gives the same bytes; a test compares README with it.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, record
from benchmarks.shapes import TINY

README = machine.ROOT / "README.md"
BEGIN, END = "<!-- benchmarks: written by make bench-report -->", "<!-- /benchmarks -->"
# README's table: cases of the machine below, and what README calls them.
README_MACHINE = "cpu-amd-epyc-avx512-bf16-2-threads"
README_ROWS = {
    "soft_connector/released/T256/bfloat16": "connector, training step, 256 tokens",
    "soft_connector_prepacked/released/T256/bfloat16": "connector, prepacked, forward, 256 tokens",
    "soft_connector_prepacked/released/T1/bfloat16": "connector, prepacked, forward, 1 token",
    "sparse_experts/cumo/T256/bfloat16": "CuMo's experts, training step, 256 tokens",
    "forward/T1": "Qwen3-MoE width, decode, 1 token",
    "train/T256": "Qwen3-MoE width, training step, 256 tokens",
}
# The works in the plots.
HEADLINE = (
    "soft_connector",
    "soft_connector_recompute",
    "soft_connector_forward",
    "soft_connector_prepacked",
    "gemm_forward",
    "gemm_dx",
    "gemm_dw",
    "sparse_experts_forward",
    "balance_loss",
    "soft_gate",
    "topk_gate",
)
# Our own op in plain PyTorch: compared with, but no peer.
OWN = "reference"
# Whole models: python -m benchmarks.experts_models, and benchmarks.llama_cpp.
MODELS = "experts_models"
STEPS = {"forward": "forward", "train": "training step"}
LLAMA_CPP = "llama_cpp"
COMPILED = "compiled grouped_mm"
MODEL_PEERS = ("eager", "batched_mm", "grouped_mm", COMPILED)

Record = dict[str, Any]


def ratio_text(ratio: float) -> str:
    """Two digits and more; a loss is bold."""
    text = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"
    return f"**{text}**" if ratio < 1 else text


def milliseconds(value: float) -> str:
    """Three digits; all of them above a second."""
    return f"{value:.3f}" if value < 1 else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def days(dates: list[str]) -> str:
    """The day of all dates and times, or the first and the last."""
    first, last = min(dates)[:10], max(dates)[:10]
    return first if first == last else f"{first} to {last}"


def state(runs: Sequence[Record]) -> str:
    """The state of the kernels, if all runs are of one; else their commits."""
    found = {run.get("kernels") for run in runs}
    if len(found) == 1 and None not in found:
        return f"kernels {found.pop()}"
    return f"commit {' and '.join(sorted({run['commit'] for run in runs}))}"


def slug(document: Record) -> str:
    return machine.slug(document["machine"], document["threads"])


def rows(document: dict[str, Any]) -> list[Record]:
    """The records of real shapes, in the order of the table of cases."""
    from benchmarks.cases import CASES

    order = list(CASES)

    def place(key: str) -> tuple[int, str, str, int, str]:
        case, shape, tokens, dtype = key.split("/")[:4]
        return order.index(case) if case in order else len(order), shape, dtype, int(tokens[1:]), key

    keys = sorted(document["cases"], key=place)
    return [document["cases"][k] for k in keys if document["cases"][k]["shape"] not in TINY]


def timed(records: list[Record]) -> list[Record]:
    return [r for r in records if r["peers"]]


def rivals(r: Record) -> dict[str, Record]:
    """The peers, without the plain formula and without our own reference."""
    return {n: p for n, p in r["peers"].items() if n not in (r["baseline"], OWN)}


def losses(document: dict[str, Any]) -> list[str]:
    """Every comparison in which ours is slower."""
    return [
        f"{_name(r)}: {ratio_text(p['ratio'])} of {name}" for r in timed(rows(document)) for name, p in r["peers"].items() if p["ratio"] < 1
    ]


def _name(r: Record) -> str:
    return "/".join([r["case"], r["shape"], f"T{r['tokens']}", r["dtype"], *([r["backend"]] if "backend" in r else [])])


def about(document: dict[str, Any]) -> str:
    """The machine and the runs, in a sentence or two."""
    m, runs = document["machine"], [r["run"] for r in rows(document)]

    def distinct(name: str) -> str:
        return " and ".join(sorted({str(run[name]) for run in runs}))

    copy = sorted(run["copy_gbps"] for run in runs)
    gemm: dict[str, list[float]] = {}
    for run in runs:
        for dtype, rate in run["gemm_gflops"].items():
            gemm.setdefault(dtype, []).append(rate)
    peaks = ", ".join(f"{dtype} {_span(rates)}" for dtype, rates in sorted(gemm.items()))
    cpu = f"{m['cpu']} (family/model {m['family_model']}, {m['cores']} cores, {', '.join(m['flags'])}), {document['threads']} threads"
    gpu = ""
    if "gpu" in m:
        gpu = f"{m['gpu']} (compute capability {m['capability']}, {m['multiprocessors']} SMs, {m['gpu_memory_gib']} GiB) beside "
    return (
        f"{gpu}{cpu}, "
        f"torch {distinct('torch')}, {state(runs)}, {days([run['date'] for run in runs])}. "
        f"Measured in the same runs: a copy moves {_span(copy)} GB/s "
        f"(read and written bytes), {distinct('gemm_loop')} reaches {peaks} GFLOP/s. {machine.memory_of(m)}"
    )


def _span(values: list[float]) -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"


def readme(documents: list[Record], models: list[Record]) -> str:
    """The six rows between README's markers."""
    (suite,) = (d for d in documents if slug(d) == README_MACHINE)
    (model,) = (d for d in models if slug(d) == README_MACHINE)
    lines = [f"| work (CPU, {suite['threads']} threads, bf16) | against the plain loop | against the fastest other |", "|---|---|---|"]
    runs = []
    for key, title in README_ROWS.items():
        if key in suite["cases"]:
            r = suite["cases"][key]
            others = rivals(r)
            baseline = ratio_text(r["peers"][r["baseline"]]["ratio"])
        else:
            r = model["cases"][key]
            others, baseline = r["peers"], ""
        name = min(others, key=lambda n: others[n]["ratio"])
        lines.append(f"| {title} | {baseline} | {ratio_text(others[name]['ratio'])} ({name}) |")
        runs.append(r["run"])
    lost = sum(len(losses(d)) for d in documents) + sum(len(model_losses(d)) for d in models)
    measured = [*(r for d in documents for r in timed(rows(d))), *(c for d in models for c in model_cells(d))]
    compared = sum(len(r["peers"]) for r in measured)
    return (
        "\n".join(lines) + f"\n\nSpeed-up: median time of the peer / ours (**bold: a loss**). {suite['machine']['cpu']}, "
        f"{suite['machine']['flags'][0].upper()}, {days([run['date'] for run in runs])}; {state(runs)}.\n"
        f"All {compared} comparisons, with the {lost} that we lose: `make docs`, page Benchmarks (from benchmarks/results/)."
    )


def markdown(documents: list[dict[str, Any]], models: list[Record], llama_cpp: Sequence[Record] = ()) -> str:
    """The page Benchmarks."""
    parts = [
        "# Benchmarks",
        "Written by `make docs` from benchmarks/results/; `python -m benchmarks --help` says how it is measured. Ratio: p50 of the "
        "peer over p50 of ours, taken alternately in one process; above 1 ours is faster, a bold one is a loss. GFLOP/s counts the "
        "products that the mathematics needs, the same for every side; GB/s each weight, input, output and gradient once. "
        "`saved` is kept from forward to backward besides weights and inputs; `peak` is what one call needs above its weights and "
        "inputs, in a process of its own. `reference` is our own op in plain PyTorch.",
    ]
    for document in documents:
        records = rows(document)
        if not records:
            continue
        name = slug(document)
        parts += [
            f"## {name}",
            about(document),
            f"![ratio to each peer](benchmarks-{name}-ratios.svg)",
            f"![roofline](benchmarks-{name}-roofline.svg)",
        ]
        lost = losses(document)
        parts.append(f"### Where ours is slower ({len(lost)})")
        parts.append("\n".join(f"- {line}" for line in lost) or "Nowhere.")
        parts.append("### Everything")
        lines = [
            "| case | side | p50 ms | p20 to p80 | ratio | GFLOP/s | GB/s | saved MB | peak MB |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        reasons: dict[str, list[str]] = {}
        for r in records:
            flops, nbytes = r.get("flops", 0), r.get("bytes", 0)
            sides = {"ours": r["ours"], **r["peers"]} if r["peers"] else {}
            served = ", ".join(f"{op}: {b}" for op, b in r.get("served_by", {}).items())
            for side, s in sides.items():
                seconds, mine = s["p50_ms"] / 1e3, side == "ours"
                cells = (
                    _name(r) if mine else "",
                    f"ours ({served})" if mine else side,
                    milliseconds(s["p50_ms"]),
                    f"{milliseconds(s['p20_ms'])} to {milliseconds(s['p80_ms'])}",
                    "" if mine else ratio_text(s["ratio"]),
                    f"{flops / seconds / 1e9:.3g}" if flops else "",
                    f"{nbytes / seconds / 1e9:.3g}",
                    f"{s['saved_bytes'] / 1e6:.3g}",
                    f"{s['peak_bytes'] / 1e6:.0f}" if s.get("peak_bytes") is not None else "",
                )
                lines.append(f"| {' | '.join(cells)} |")
            for kind in ("skipped", "wrong"):
                for side, reason in r[kind].items():
                    reasons.setdefault(f"{side}: {'WRONG, not timed: ' if kind == 'wrong' else ''}{reason}", []).append(_name(r))
        parts.append("\n".join(lines))
        if reasons:
            parts.append("### Not timed")
            parts.append("\n".join(f"- {reason} ({', '.join(where)})" for reason, where in reasons.items()))
    return "\n\n".join([*parts, *models_markdown(models), *llama_cpp_markdown(llama_cpp)]) + "\n"


# --- whole models ------------------------------------------------------------------------------------------------------------
def model_cells(document: Record) -> list[Record]:
    """Forward before training, fewer tokens first."""
    return sorted(document["cases"].values(), key=lambda c: (list(STEPS).index(c["step"]), c["tokens"]))


def model_losses(document: Record) -> list[str]:
    """Every comparison in which ours is slower."""
    return [
        f"{STEPS[case['step']]}, T = {case['tokens']}: {ratio_text(peer['ratio'])} of {name}"
        for case in model_cells(document)
        for name, peer in case["peers"].items()
        if peer["ratio"] < 1
    ]


def about_models(document: Record) -> str:
    """Machine, runs and model."""
    runs = [case["run"] for case in model_cells(document)]

    def distinct(name: str) -> str:
        return " and ".join(sorted({str(run[name]) for run in runs}))

    dtypes = " and ".join(sorted({case.get("dtype", "bfloat16") for case in model_cells(document)}))
    layers = {case["step"]: case["layers"] for case in model_cells(document)}
    depth = " and ".join(f"{n} layers ({STEPS[step]})" for step, n in layers.items())
    return (
        f"Qwen3-MoE in the width of its 30B-A3B (128 experts of 768, 8 chosen, model width 2048, {dtypes}), {depth}: "
        f"{document['machine']['cpu']}, {document['threads']} threads, torch {distinct('torch')}, transformers {distinct('transformers')}, "
        f"{state(runs)}, {days([run['date'] for run in runs])}; `cmoe` was served by the {distinct('served_by')} "
        f"backend. {machine.memory_of(document['machine'])}"
    )


def models_markdown(documents: list[Record]) -> list[str]:
    """The page's section on whole models."""
    if not documents:
        return []
    parts = [
        "## MoE models of transformers",
        '`python -m benchmarks.experts_models`: `experts_implementation="cmoe"` against transformers\' own. T = 1 is a decoding step '
        "behind a cache of 128 tokens (in training one token without a cache), more are a prefill; a training step is forward and backward "
        "with every gradient. The whole model is timed, with attention, router and head. All sides take turns; ratios as above. "
        f"{COMPILED}: torch.compile of the model, which has compiled before.",
    ]
    for document in documents:
        parts.append(about_models(document))
        lines = [
            "| step | T | cmoe, p50 ms | p20 to p80 | " + " | ".join(f"{peer}, ms | ratio" for peer in MODEL_PEERS) + " |",
            "|---" * (4 + 2 * len(MODEL_PEERS)) + "|",
        ]
        for case in model_cells(document):
            ours, row = case["ours"], []
            for name in MODEL_PEERS:
                peer = case["peers"].get(name)
                row.append(" | " if peer is None else f"{milliseconds(peer['p50_ms'])} | {ratio_text(peer['ratio'])}")
            spread = f"{milliseconds(ours['p20_ms'])} to {milliseconds(ours['p80_ms'])}"
            lines.append(f"| {STEPS[case['step']]} | {case['tokens']} | {milliseconds(ours['p50_ms'])} | {spread} | {' | '.join(row)} |")
        parts.append("\n".join(lines))
        lost = model_losses(document)
        parts.append(f"Ours is slower in {len(lost)}" + (": " + "; ".join(lost) + "." if lost else "."))
        left = {
            f"{name}: {why} ({STEPS[case['step']]}, T = {case['tokens']})"
            for case in model_cells(document)
            for name, why in case["skipped"].items()
        }
        if left:
            parts.append("Not timed: " + "; ".join(sorted(left)) + ".")
        if "lora" in document:
            parts.append(lora_memory(document["lora"]))
    return parts


def llama_cpp_markdown(documents: Sequence[Record]) -> list[str]:
    """The page's section on llama.cpp."""
    parts = []
    for document in documents:
        cases = sorted(document["cases"].values(), key=lambda case: (case["weights"], case["tokens"]))
        run = cases[0]["run"]
        lines = ["| our weights, theirs | T | cmoe, tokens/s | llama.cpp, tokens/s | ratio |", "|---|---|---|---|---|"]
        for case in cases:
            rates = [f"{case['sides'][side]['tokens_per_second']:.3g}" for side in ("cmoe", LLAMA_CPP)]
            cells = (f"{case['weights']}, {case['theirs']}", str(case["tokens"]), *rates, ratio_text(case["ratio"]))
            lines.append(f"| {' | '.join(cells)} |")
        parts += [
            f"`python -m benchmarks.llama_cpp`: {cases[0]['layers']} such layers beside llama.cpp's llama-bench, in turn. "
            f"{document['machine']['cpu']}, {document['threads']} threads, torch {run['torch']}, {run['date'][:10]}.",
            "\n".join(lines),
        ]
    return ["## llama.cpp", *parts] if parts else []


def lora_memory(found: Record) -> str:
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


def insert(text: str, table: str) -> str:
    """README with the table between its markers."""
    if len(re.findall(f"{re.escape(BEGIN)}.*?{re.escape(END)}", text, flags=re.DOTALL)) != 1:
        raise ValueError(f"README must have {BEGIN} and {END} once, in this order")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}"


# --- plots -------------------------------------------------------------------------------------------------------------------
def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "cmoe", "svg.fonttype": "none", "font.size": 7, "figure.autolayout": False})
    from matplotlib import pyplot

    return pyplot


def plot_ratios(document: dict[str, Any], path: Path) -> None:
    """A bar for each peer of each headline work; a bar to the left of 1 is a loss, and hatched."""
    plt = _pyplot()
    records = [r for r in timed(rows(document)) if r["case"] in HEADLINE]
    names = sorted({n for r in records for n in r["peers"]})
    colors = dict(zip(names, plt.get_cmap("tab20").colors, strict=False))
    figure, axes = plt.subplots(figsize=(7.5, 1 + 0.13 * sum(len(r["peers"]) + 1 for r in records)))
    place, ticks, labels = 0.0, [], []
    for r in records:
        start = place
        for name, peer in r["peers"].items():
            lost = peer["ratio"] < 1
            axes.barh(
                place,
                peer["ratio"] - 1,
                left=1,
                height=0.85,
                color=colors[name],
                hatch="////" if lost else None,
                edgecolor="red" if lost else "none",
            )
            place += 1
        ticks.append((start + place - 1) / 2)
        labels.append(_name(r))
        place += 1
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(yticks=ticks, yticklabels=labels, xlabel="times as fast as the peer (hatched: ours is slower)")
    axes.margins(y=0.005)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.legend(
        handles=[plt.Rectangle((0, 0), 1, 1, color=colors[n], label=n) for n in names], loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4
    )
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def plot_roofline(document: dict[str, Any], path: Path) -> None:
    """Our points under the copy bandwidth and the GEMM rate measured beside them."""
    plt = _pyplot()
    records = [r for r in timed(rows(document)) if r["flops"]]
    figure, axes = plt.subplots(figsize=(7, 4.5))
    if records:
        dtypes = sorted({r["dtype"] for r in records})
        copy = max(r["run"]["copy_gbps"] for r in records)
        reach = [r["flops"] / r["bytes"] for r in records]
        grid = [min(reach) / 2 * (4 * max(reach) / min(reach)) ** (i / 100) for i in range(101)]
        for dtype, style in zip(dtypes, ("-", "--", ":"), strict=False):
            peak = max(r["run"]["gemm_gflops"][dtype] for r in records if r["dtype"] == dtype)
            axes.plot(grid, [min(peak, copy * g) for g in grid], style, color="black", linewidth=0.8, label=f"{dtype}: copy and torch.mm")
        cases = list(dict.fromkeys(r["case"] for r in records))
        colors = dict(zip(cases, plt.get_cmap("tab20").colors, strict=False))
        for case in cases:
            mine = [r for r in records if r["case"] == case]
            axes.scatter([r["flops"] / r["bytes"] for r in mine], [r["ours"]["gflops"] for r in mine], s=14, color=colors[case], label=case)
        axes.set(xscale="log", yscale="log")
        axes.legend(fontsize=6)
    axes.set(xlabel="FLOP per byte that must move", ylabel="GFLOP/s (products the mathematics needs)")
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def write_pages(folder: Path) -> None:
    """The page and its plots."""
    documents = record.documents()
    (folder / "benchmarks.md").write_text(markdown(documents, *(record.documents(suites=[name]) for name in (MODELS, LLAMA_CPP))))
    for document in documents:
        if timed(rows(document)):
            plot_ratios(document, folder / f"benchmarks-{slug(document)}-ratios.svg")
            plot_roofline(document, folder / f"benchmarks-{slug(document)}-roofline.svg")


def main() -> None:
    README.write_text(insert(README.read_text(), readme(record.documents(), record.documents(suites=[MODELS]))))
    print(f"wrote the table in {README.name}; `make docs` writes the page and the plots")


if __name__ == "__main__":
    main()
