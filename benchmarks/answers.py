"""An answer of unimed's model: the time to its first token and the tokens a second after it, by what computes the connector.

    python -m benchmarks.answers                        the demo's model, fp32, one image
    python -m benchmarks.answers --width full           Uni-Med's widths in bf16: tower and connector whole, two layers of Llama-2-7B

    kernels        our ops, as they serve this processor
    prepacked      the same after prepack()
    int8           the same after prepack(torch.int8)
    reference      the same formulas in plain PyTorch; `python -m benchmarks` has them fused and compiled, too

The first token takes the tower, the connector and the prompt; the others take the language model behind its cache, where no side differs.
Weights are random, so an answer has --tokens tokens whatever they are. The sides' image embeddings are compared before anything is timed;
the sides take turns.
"""

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import timer
from benchmarks.training import WIDTHS, arguments, prepare, require_memory, run
from cmoe_kernels import backends, use_backend

SUITE = "answers"
BOUND = {"kernels": 3e-2, "prepacked": 3e-2, "int8": 6e-2}  # relative distance of the image embeddings in bf16
EXACT = {"kernels": 1e-5, "prepacked": 1e-5, "int8": 6e-2}  # in fp32
Side = Callable[[int], Tensor]


def connectors(connector: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The connector as each side has it."""
    made = {name: copy.deepcopy(connector) for name in ("kernels", "prepacked", "int8")}
    made["prepacked"].prepack()
    made["int8"].prepack(torch.int8)
    return made | {"reference": connector}


def sides(model: Any, inputs: dict[str, Tensor]) -> tuple[dict[str, Side], Callable[[str], Tensor]]:
    """Functions that give an answer, by side and from its number of tokens; and one that gives a side's image embeddings."""
    by_name = connectors(model.connector)

    def on(name: str) -> None:
        model.connector = by_name[name]

    def answer(name: str, tokens: int) -> Tensor:
        on(name)
        with use_backend("reference" if name == "reference" else "auto"):
            return model.generate(**inputs, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)

    @torch.no_grad()
    def embeddings(name: str) -> Tensor:
        on(name)
        with use_backend("reference" if name == "reference" else "auto"):
            return model.connector(model.encode_images(inputs["pixel_values"]), task=inputs["task_ids"]).embeddings.double()

    return {name: lambda tokens, name=name: answer(name, tokens) for name in by_name}, embeddings


def check(embeddings: Callable[[str], Tensor], bf16: bool) -> dict[str, float]:
    """The relative distance of each side's image embeddings to the reference's.

    Raises:
        ValueError: it is beyond what rounding makes.
    """
    exact, apart = embeddings("reference"), {}
    for name, bound in (BOUND if bf16 else EXACT).items():
        apart[name] = float((embeddings(name) - exact).norm() / exact.norm())
        if not apart[name] < bound:
            raise ValueError(f"{name}: the image embeddings are {apart[name]:.2e} away from those of plain PyTorch, at most {bound:g}")
    return {name: float(f"{one:.2e}") for name, one in apart.items()}


def measure(width: str, tokens: int, seconds: float, overrides: list[str], most_gb: float, cpu_time: bool = False) -> dict[str, Any]:
    from unimed.train import recipe as recipes

    recipe = recipes.load("tiny", [one for one in (*WIDTHS[width][0].split(), *overrides) if "lora" not in one])  # merged for serving
    require_memory(width, recipe, most_gb)
    model, inputs = prepare(recipe, 1)
    bf16 = recipe.train.precision == "bf16"
    model.eval().requires_grad_(False)
    if bf16:
        model.bfloat16()
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    del inputs["labels"]
    answers, embeddings = sides(model, inputs)
    apart = check(embeddings, bf16)
    clock = time.process_time if cpu_time else time.perf_counter
    names = list(answers)
    first = timer.in_turn([lambda name=name: answers[name](1) for name in names], seconds, least=3, clock=clock)
    (whole,) = timer.in_turn([lambda: answers["kernels"](tokens)], seconds / 4, least=2, clock=clock)
    rest = whole.quantile(0.5) - first[0].quantile(0.5)
    found = {}
    for name, times in zip(names, first, strict=True):
        ratio = 1.0 if name == "kernels" else timer.ratio(first[0], times)
        found[name] = {**times.summary(), "kernels_faster_by": round(ratio, 3)}
    return {
        "clock": "CPU time" if cpu_time else "time",
        "prompt_tokens": inputs["input_ids"].shape[1],
        "answer_tokens": tokens,
        "parameters": sum(p.numel() for p in model.parameters()),
        "embeddings_apart": apart,
        "served_by": backends.choose("soft_experts", "cpu", torch.bfloat16 if bf16 else torch.float32),
        "first_token": found,
        "next_tokens_per_second": round((tokens - 1) / max(rest, 1e-9), 2),
    }


def row(document: dict[str, Any]) -> str:
    """README's line of what was measured at both widths."""
    first = [document["cases"][width]["first_token"] for width in WIDTHS]
    times = " and ".join(f"{one['kernels']['p50_ms']:,.0f}" for one in first)
    faster = " and ".join(f"{one['reference']['kernels_faster_by']:.2f}" for one in first)
    return f"An answer's first token: {times} ms, {faster} times as fast (`python -m benchmarks.answers`)."


def main() -> None:
    parser = arguments(SUITE, __doc__, "three first tokens of each")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of an answer, two or more (default: 32)")
    options = parser.parse_args()
    if options.tokens < 2:
        parser.error("--tokens: must be at least 2")
    found, out = run(
        parser,
        options,
        SUITE,
        lambda: measure(options.width, options.tokens, options.seconds, options.overrides, options.most_gb, options.cpu_time),
    )
    for name, one in found["first_token"].items():
        times = " / ".join(f"{one[f'p{q}_ms']:.1f}" for q in (20, 50, 80))
        print(f"{name}: first token after p20/p50/p80 {times} ms; kernels {one['kernels_faster_by']:.2f} times as fast")
    print(f"then {found['next_tokens_per_second']:g} tokens/s with any of them; {out}")


if __name__ == "__main__":
    main()
