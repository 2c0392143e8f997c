"""Plots and tables of what was measured: ``python -m benchmarks.report`` (``make bench-report``).

Reads every results file of the suite in benchmarks/results/, and writes docs/benchmarks.md (all of it), two plots per machine, and the
table between the markers in README.md. The same JSON gives the same bytes; a test compares README and docs with it.
"""

import re
from pathlib import Path
from typing import Any

from benchmarks import machine, models_report, record
from benchmarks.digits import days, milliseconds, ratio_text
from benchmarks.shapes import TINY

README = machine.ROOT / "README.md"
DOCS = machine.ROOT / "docs"
BEGIN, END = "<!-- benchmarks: written by make bench-report -->", "<!-- /benchmarks -->"
# The works of README's table; docs/benchmarks.md has all.
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

Record = dict[str, Any]


def rows(document: dict[str, Any]) -> list[Record]:
    """The records of real shapes, in the order of the table of cases."""
    from benchmarks.cases import CASES

    order = [i.key for case in CASES.values() for i in case.instances()]
    keys = sorted(document["cases"], key=lambda k: (order.index(k) if k in order else len(order), k))
    return [document["cases"][k] for k in keys if document["cases"][k]["shape"] not in TINY]


def timed(records: list[Record]) -> list[Record]:
    return [r for r in records if r["peers"]]


def works(records: list[Record]) -> dict[tuple[str, str, str], list[Record]]:
    """Records of one kind of work, which differ in the number of tokens alone."""
    found: dict[tuple[str, str, str], list[Record]] = {}
    for r in timed(records):
        found.setdefault((r["case"], r["shape"], r["dtype"]), []).append(r)
    return found


def rivals(r: Record) -> dict[str, Record]:
    """The peers, without the plain formula and without our own reference."""
    return {n: p for n, p in r["peers"].items() if n not in (r["baseline"], OWN)}


def headline_table(document: dict[str, Any]) -> str:
    """README's table for one machine."""
    chosen = {k: v for k, v in works(rows(document)).items() if k[0] in HEADLINE}
    tokens = sorted({r["tokens"] for group in chosen.values() for r in group})
    lines = ["| work | " + " | ".join(["", *(f"T = {t}" for t in tokens)]) + " |", "|---|---|" + "---|" * len(tokens)]
    for (_, shape, dtype), group in chosen.items():
        at = {r["tokens"]: r for r in group}
        first = group[0]
        cells: dict[str, dict[int, str]] = {"ours, ms": {}, f"vs {first['baseline']}": {}, "vs the fastest other": {}}
        for t, r in at.items():
            ours = r["ours"]
            cells["ours, ms"][t] = milliseconds(ours["p50_ms"]) + (f" ({ours['gemm_share']:.0%})" if r["flops"] else "")
            cells[f"vs {r['baseline']}"][t] = ratio_text(r["peers"][r["baseline"]]["ratio"]) if r["baseline"] in r["peers"] else ""
            others = rivals(r)
            if others:
                name = min(others, key=lambda n: others[n]["ratio"])
                cells["vs the fastest other"][t] = f"{ratio_text(others[name]['ratio'])} {name}"
            saved = r["peers"].get(r["baseline"], {}).get("saved_bytes")
            if saved and r["case"].startswith("soft_connector"):
                cells.setdefault("bytes saved for backward", {})[t] = f"{ours['saved_bytes'] / saved:.0%}"
        title = f"{first['title']} ({shape}, {dtype})"
        for what, by_tokens in cells.items():
            if by_tokens:
                lines.append(f"| {title} | {what} | " + " | ".join(by_tokens.get(t, "") for t in tokens) + " |")
                title = ""
    return "\n".join(lines)


def losses(document: dict[str, Any]) -> list[str]:
    """Every comparison in which ours is slower."""
    return [
        f"{_name(r)}: {ratio_text(p['ratio'])} of {name}" for r in timed(rows(document)) for name, p in r["peers"].items() if p["ratio"] < 1
    ]


def _name(r: Record) -> str:
    return f"{r['case']}/{r['shape']}/T{r['tokens']}/{r['dtype']}"


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
    return (
        f"{m['cpu']} (family/model {m['family_model']}, {m['cores']} cores, {', '.join(m['flags'])}), {document['threads']} threads, "
        f"torch {distinct('torch')}, commit {distinct('commit')}, {days([run['date'] for run in runs])}. "
        f"Measured in the same runs: a copy moves {_span(copy)} GB/s "
        f"(read and written bytes), {distinct('gemm_loop')} reaches {peaks} GFLOP/s. {machine.memory_of(m)}"
    )


def _span(values: list[float]) -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"


def readme(documents: list[dict[str, Any]], models: list[dict[str, Any]]) -> str:
    """What stands between README's markers."""
    parts = []
    for document in documents:
        if not timed(rows(document)):
            continue
        lost, compared = losses(document), sum(len(r["peers"]) for r in timed(rows(document)))
        parts.append(
            f"{about(document)}\n\n{headline_table(document)}\n\n"
            "How many times as fast ours is (p50 of the peer over ours; **bold: ours is slower**), in brackets our share of the GEMM rate. "
            f"Ours is slower in {len(lost)} of {compared} comparisons; docs/benchmarks.md lists them, with times, spread, bytes and "
            "what was skipped and why."
        )
    return "\n\n".join([*parts, models_report.readme(models)]).strip() or "Nothing has been measured yet: `make bench` does it."


def markdown(documents: list[dict[str, Any]], models: list[dict[str, Any]]) -> str:
    """docs/benchmarks.md."""
    parts = [
        "# Benchmarks",
        "Written by `make bench-report` from benchmarks/results/; `python -m benchmarks --help` says how it is measured. Ratio: p50 of the "
        "peer over p50 of ours, taken alternately in one process; above 1 ours is faster, a bold one is a loss. GFLOP/s counts the "
        "products that the mathematics needs, the same for every side; GB/s each weight, input, output and gradient once. "
        "`saved` is kept from forward to backward besides weights and inputs; `peak` is what one call needs above its weights and "
        "inputs, in a process of its own. `reference` is our own op in plain PyTorch.",
    ]
    for document in documents:
        records = rows(document)
        if not records:
            continue
        name = machine.slug(document["machine"], document["threads"])
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
    return "\n\n".join([*parts, *models_report.markdown(models)]) + "\n"


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


def main() -> None:
    documents, models = record.documents(), record.documents(suite=models_report.SUITE)
    DOCS.mkdir(exist_ok=True)
    (DOCS / "benchmarks.md").write_text(markdown(documents, models))
    README.write_text(insert(README.read_text(), readme(documents, models)))
    for document in documents:
        if timed(rows(document)):
            name = machine.slug(document["machine"], document["threads"])
            plot_ratios(document, DOCS / f"benchmarks-{name}-ratios.svg")
            plot_roofline(document, DOCS / f"benchmarks-{name}-roofline.svg")
    print(f"{len(documents)} results files; wrote {README.name} and {DOCS.name}/")


if __name__ == "__main__":
    main()
