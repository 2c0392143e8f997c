"""A transformers model with "cmoe" under it, against eager, batched_mm, grouped_mm, and torch.compile of the model with grouped_mm.

    python -m benchmarks.experts_models                        layers of Qwen3-30B-A3B's width in bf16: 8 forward (10 GB), 2 in training
    python -m benchmarks.experts_models --tokens 16 --steps train
    python -m benchmarks.experts_models --dtype float32        on a CPU without bf16 instructions: 4 layers and 1
    python -m benchmarks.experts_models --lora                 memory of LoRA on the experts

One token is a decoding step behind a cache of 128; more are a prefill. A training step is forward and backward, every gradient: they are as
large as the weights, which is why it has fewer layers, and why it matters where their pages come from (--keep-pages). Before ours is timed,
its experts are compared with grouped_mm (output, and in training all gradients); a wrong result gets no time. All sides are timed in turn.
What is measured is kept cell by cell in benchmarks/results/; `make bench-report` writes the tables.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

import cmoe_kernels.integrations.transformers  # noqa: F401  registers "cmoe"
from benchmarks import machine, memory, record, timer
from benchmarks.report import COMPILED
from benchmarks.report import MODEL_PEERS as PEERS
from benchmarks.report import MODELS as SUITE
from cmoe_kernels import backends

LAYERS = {"forward": 8, "train": 2}  # in bf16; half of them in fp32
CACHED = 128
# batched_mm gathers the weights of every selection: above this it would swap, not compute.
MOST_COPIED = 4 * 2**30
# eager's backward pass writes a gradient of all experts' weights for each expert that was used.
MOST_WRITTEN = 128 * 2**30
LONG = 5.0  # seconds of a call: such a peer is timed once


def build(
    layers: int, experts: int = 128, hidden: int = 2048, of_expert: int = 768, dtype: torch.dtype = torch.bfloat16
) -> transformers.Qwen3MoeForCausalLM:
    """Qwen3-30B-A3B's layers (8 experts chosen), with a small vocabulary."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=hidden,
        moe_intermediate_size=of_expert,
        num_experts=experts,
        num_experts_per_tok=8,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=4,
        head_dim=128,
        norm_topk_prob=True,
    )
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(config).to(dtype)
    model = model.to_empty(device="cpu").eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for p in model.parameters():
        if p.dim() < 3:
            torch.nn.init.normal_(p, 0, p.shape[-1] ** -0.5) if p.dim() > 1 else torch.nn.init.ones_(p)
    first = model.model.layers[0].mlp.experts
    for p in first.parameters():
        torch.nn.init.normal_(p, 0, p.shape[-1] ** -0.5)
    for place, layer in enumerate(model.model.layers[1:], 1):
        for name, p in layer.mlp.experts.named_parameters():
            p.data.copy_(first.get_parameter(name).roll(place, 0))  # in another order: drawing ten gigabytes would take minutes
    return model


def shorten(model: Any, layers: int) -> None:
    """Drop all but the first layers."""
    del model.model.layers[layers:]
    model.config.num_hidden_layers = layers


def make_call(model: Any, implementation: str, tokens: int, train: bool) -> Callable[[], torch.Tensor]:
    """One step; the gradients of the last one are freed inside it."""
    run = torch.compile(model) if implementation == COMPILED else model
    ids = torch.randint(0, 1024, (1, tokens), generator=torch.Generator().manual_seed(1))
    cache = None
    if tokens == 1 and not train:
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            model(torch.zeros(1, CACHED, dtype=torch.int64), cache=cache)

    def step() -> torch.Tensor:
        model.config._experts_implementation = "grouped_mm" if implementation == COMPILED else implementation
        model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(train):
            logits = run(ids, cache=cache, use_cache=cache is not None).logits
            if cache is not None:
                cache.crop(-tokens)
            if train:
                logits.float().square().mean().backward()
        return logits.detach()

    return step


def check(model: Any, tokens: int, train: bool) -> float:
    """The largest relative RMS error, of output and gradients, of the first layer's experts on equal inputs, against grouped_mm.

    Of the experts alone: between two roundings of a layer's output, a later layer's router sends some tokens to other experts.

    Raises:
        ValueError: it is above 2 %, far beyond what bf16 rounding makes.
    """
    experts, given = model.model.layers[0].mlp.experts, []
    step = make_call(model, "grouped_mm", tokens, False)
    hook = experts.register_forward_pre_hook(lambda _, arguments: given.extend(arguments))
    step()
    hook.remove()
    x, indices, weights = given
    dy, results = torch.randn_like(x), []
    for implementation in ("grouped_mm", "cmoe"):
        model.config._experts_implementation = implementation
        leaves = [t.detach().requires_grad_(train) for t in (x, weights)]
        with torch.set_grad_enabled(train):
            y = experts(leaves[0], indices, leaves[1])
        grads = torch.autograd.grad(y, [*leaves, *experts.parameters()], dy) if train else ()
        results.append([y.detach(), *grads])
    worst = max(float((o - e).float().norm() / e.float().norm()) for e, o in zip(*results, strict=True))
    if not worst < 0.02:
        raise ValueError(f"cmoe differs from grouped_mm by {worst:.1%}")
    return worst


def measure(model: Any, tokens: int, step: str, seconds: float, peers: Sequence[str] = PEERS) -> dict[str, Any]:
    """Check, then time, one cell: ours and every peer in turn."""
    train = step == "train"
    error = check(model, tokens, train)
    experts = model.model.layers[0].mlp.experts
    copied, skipped = tokens * 8 * experts.gate_up_proj[0].nbytes, {}
    if copied > MOST_COPIED:
        skipped["batched_mm"] = f"it would copy {copied / 2**30:.0f} GiB of weights per layer"
    used = experts.num_experts * (1 - (1 - 8 / experts.num_experts) ** tokens)
    written = used * sum(p.nbytes for p in experts.parameters())
    if train and written > MOST_WRITTEN:
        skipped["eager"] = f"its backward pass would write {written / 2**30:.0f} GiB per layer"
    calls = {name: make_call(model, name, tokens, train) for name in ("cmoe", *peers) if name not in skipped}
    try:
        for _ in range(3 if COMPILED in calls else 0):  # it compiles, and once more where a cropped cache has other strides
            calls[COMPILED]()
    except Exception as reason:
        skipped[COMPILED] = record.why(reason)
        del calls[COMPILED]
    mine, *theirs = timer.in_turn(list(calls.values()), seconds, least=3, once_above=LONG)
    return {
        "tokens": tokens,
        "step": step,
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": model.config.num_hidden_layers,
        "error": round(error, 5),
        "ours": mine.summary(),
        "peers": {
            name: {**times.summary(), "ratio": round(timer.ratio(mine, times), 3)}
            for name, times in zip(list(calls)[1:], theirs, strict=True)
        },
        "skipped": skipped,
    }


def lora_memory(experts: int, hidden: int = 2048) -> dict[str, Any]:
    """Peak memory of one layer's training step above its weights, with and without LoRA on all its experts."""
    import peft

    model = build(1, experts, hidden).requires_grad_(False)
    weights = sum(p.nbytes for p in model.model.layers[0].mlp.experts.parameters())
    model.get_input_embeddings().requires_grad_(True)
    frozen = memory.peak(make_call(model, "cmoe", 64, True))
    lora = peft.get_peft_model(
        model, peft.LoraConfig(r=16, target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    )
    peaks = {}
    for implementation in ("cmoe", "eager", "grouped_mm"):
        peaks[implementation] = memory.peak(make_call(lora.base_model.model, implementation, 64, True))
    return {"experts": experts, "tokens": 64, "rank": 16, "weights_bytes": weights, "frozen_peak_bytes": frozen, "lora_peak_bytes": peaks}


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.experts_models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256, 1024])
    parser.add_argument("--steps", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the weights (default: bfloat16)")
    parser.add_argument(
        "--layers", type=int, help=f"of both steps (default: {', '.join(f'{s} {n}' for s, n in LAYERS.items())}; fp32 half)"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=6, help="time for each cell, but at least three calls of each side (default: 6)")
    parser.add_argument("--keep-pages", action="store_true", help="malloc keeps the pages of freed memory (glibc): a file of its own")
    parser.add_argument("--lora", action="store_true", help="measure the memory of LoRA on the experts, and nothing else")
    options = parser.parse_args()
    if options.keep_pages:
        machine.keep_pages()
    threads = record.set_threads(options.threads)
    described, run = machine.describe(), machine.run_info(threads)
    dtype = getattr(torch, options.dtype)
    run |= {"transformers": transformers.__version__, "served_by": backends.choose("sparse_experts", "cpu", dtype)}
    out = record.RESULTS / f"experts-models-{machine.slug(described, threads)}.json"
    document: dict[str, Any] = {"suite": SUITE, "machine": described, "threads": threads, "cases": {}}
    if out.exists():
        document = json.loads(out.read_text())

    def keep(kind: str, values: dict[str, Any]) -> None:
        document[kind] = values
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")

    if options.lora:
        keep("lora", {**lora_memory(experts=32), "run": run})
        print(json.dumps(document["lora"], indent=1))
        return
    side = machine.GEMM_SIDE["cpu"]
    run |= {"gemm_loop": f"torch.mm {side}^3", "gemm_gflops": {options.dtype: round(machine.gemm_rate(dtype, "cpu", side), 1)}}
    layers = {step: options.layers or LAYERS[step] * 2 // dtype.itemsize for step in LAYERS if step in options.steps}
    model = build(max(layers.values()), dtype=dtype)
    print(f"{described['cpu']}, {threads} threads; cmoe is served by {run['served_by']}; ratio: how many times faster cmoe is", flush=True)
    for step in sorted(layers, key=lambda step: -layers[step]):
        shorten(model, layers[step])
        for tokens in options.tokens:
            print(f"{step:8} T={tokens:<5} {layers[step]} layers", end=" ", flush=True)
            case = measure(model, tokens, step, options.seconds)
            peers = "  ".join(f"{name} {p['ratio']:.2f}x" for name, p in case["peers"].items())
            print(f"cmoe {case['ours']['p50_ms']:9.1f} ms  {peers}  {case['skipped'] or ''}", flush=True)
            key = f"{step}/T{tokens}" + ("" if dtype == torch.bfloat16 else f"/{options.dtype}")
            keep("cases", {**document["cases"], key: {**case, "run": run}})
    print(f"kept in {out}")


if __name__ == "__main__":
    main()
