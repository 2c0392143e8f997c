"""By itself: the tokens of a small model, ours and vLLM's, as one line of JSON: `python tests/unimed/vllm_tokens.py FOLDER`."""

import json
import os
import sys
from pathlib import Path

from model_samples import QA, REFER, VQA, lively, picture, small

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
CHAT = "[INST] <Img><ImageHere></Img> [refer] liver [/INST]"  # as the chat template words the message below
MESSAGE = {"role": "user", "content": [{"type": "image_pil", "image_pil": picture(2)}, {"type": "text", "text": "[refer] liver"}]}
ASKED = [(REFER, picture(1)), (VQA, picture(1)), (VQA, picture(2)), (CHAT, picture(2)), (QA, None)]
TOKENS = 12


def ours(folder: Path) -> list[list[int]]:
    model, processor = small(language={"width": 64, "heads": 2})  # heads of 32: the narrowest that vLLM has on a CPU
    lively(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    made = []
    for text, image in ASKED:
        inputs = processor(text=[text], images=[image] if image else None)
        made.append(model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist())
    return made


def of_vllm(folder: Path) -> list[list[int]]:
    from unimed.serve.vllm_plugin import register

    register()
    from vllm import LLM, SamplingParams

    engine = LLM(str(folder), dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4)
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS)
    images = [
        {"prompt": text.replace("<ImageHere>", "<image>"), "multi_modal_data": {"image": image}} for text, image in ASKED[:3] if image
    ]
    # Text without an image meets no processor of ours, which would put the start of a text before it.
    given = [*engine.generate(images, greedy), *engine.chat([MESSAGE], greedy), *engine.generate(["<s>" + QA], greedy)]
    return [list(one.outputs[0].token_ids) for one in given]


if __name__ == "__main__":
    place = Path(sys.argv[1])
    print(json.dumps({"ours": ours(place), "vllm": of_vllm(place)}))
