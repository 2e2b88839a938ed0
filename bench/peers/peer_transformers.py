#!/usr/bin/env python3
"""Time transformers on one checkpoint, in BF16, and print one JSON object.

For each setting `EXPERTS/CACHE` and each batch size: prefill of all prompts at once, then greedy decoding. Each
setting is warmed up with a short run of the same batch size first.
"""

import argparse
import json
import os
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache, __version__, logging


@torch.inference_mode()
def measure(model, cache_kind: str, batch: int, input_len: int, output_len: int) -> tuple[float, float]:
    """(prefill, decode) in tokens a second over the whole batch."""
    ids = torch.randint(3, model.config.vocab_size, (batch, input_len), generator=torch.Generator().manual_seed(batch))
    if cache_kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=input_len + output_len)
    else:
        cache = DynamicCache(config=model.config)
    start = time.perf_counter()
    logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    token = logits[:, -1].argmax(-1, keepdim=True)
    prefilled = time.perf_counter()
    for _ in range(output_len):
        logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
    done = time.perf_counter()
    return batch * input_len / (prefilled - start), batch * output_len / (done - prefilled)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--model", required=True)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--input-len", type=int, default=512)
    p.add_argument("--output-len", type=int, default=64)
    p.add_argument("--batch-sizes", default="1,4,16")
    p.add_argument("--settings", default="grouped_mm/dynamic,grouped_mm/static")
    args = p.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, attn_implementation="sdpa").eval()

    results = {}
    for setting in args.settings.split(","):
        experts, cache = setting.split("/")
        model.set_experts_implementation(experts)
        results[setting] = {}
        for batch in (int(b) for b in args.batch_sizes.split(",")):
            measure(model, cache, batch, 32, 4)
            prefill, decode = measure(model, cache, batch, args.input_len, args.output_len)
            results[setting][batch] = {"prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode}
    print(json.dumps({"transformers": __version__, "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
