#!/usr/bin/env python3
"""Write small random checkpoints and what PyTorch says about them. See README.md beside this file."""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from checkpoint import random_weights, to_stored, write_folder
from compare import LIMITS, compare, relative_error
from paper_reference import PaperModel
from safetensors.torch import save_file
from variants import COMMITTED, FAMILIES, NAMED, Variant, random_variant

DECODE_STEPS = 16


def run_greedy(make_forward, prompt: list[int], decode_steps: int = DECODE_STEPS) -> dict[str, torch.Tensor]:
    """Prefill, then greedy decoding through the KV cache. `make_forward(margins)(ids [T]) -> logits [T, V]`."""
    margins = RouterMargins()
    run = make_forward(margins)

    def forward(ids):
        margins.passes.append([])
        return run(ids)

    prefill = forward(torch.tensor(prompt)).float()
    rows, tokens = [], [int(prefill[-1].argmax())]
    for _ in range(decode_steps):
        rows.append(forward(torch.tensor([tokens[-1]])).float()[-1])
        tokens.append(int(rows[-1].argmax()))
    decode = torch.stack(rows) if rows else prefill.new_zeros(0, prefill.shape[1])
    decided = torch.cat([prefill[-1:], decode])
    best = decided.topk(2, dim=-1).values
    return {
        "prompt_ids": torch.tensor(prompt),
        "prefill_logits": prefill,
        "decode_logits": decode,
        "token_ids": torch.tensor(tokens),
        "top2_margin": best[:, 0] - best[:, 1],
        "router_margin": margins.least(len(prompt) + decode_steps),
    }


class RouterMargins:
    """How far every token was from choosing other experts: the gap between the last choice and the next best,
    least over the layers. BF16 may flip a choice whose gap is within its rounding, and a flipped choice is
    another function, not a rounding error; so comparisons in BF16 stop at such a token.
    """

    def __init__(self):
        self.passes: list[list[torch.Tensor]] = []

    def record(self, gap: torch.Tensor) -> None:
        self.passes[-1].append(gap)

    def hook(self, gate, _inputs, output) -> None:
        logits = output[0].float()
        tokens, experts = logits.shape
        if not hasattr(gate, "e_score_correction_bias"):
            self.record(gap_after(logits, gate.top_k))
            return
        scores = logits.sigmoid() + gate.e_score_correction_bias
        groups = scores.view(tokens, gate.num_group, experts // gate.num_group)
        group_scores = groups.topk(2, dim=-1).values.sum(-1)
        open_groups = torch.zeros_like(group_scores).scatter(1, group_scores.topk(gate.topk_group).indices, 1.0)
        allowed = groups.masked_fill(open_groups[..., None] == 0, float("-inf")).flatten(1)
        gap = torch.minimum(gap_after(group_scores, gate.topk_group), gap_after(allowed, gate.top_k))
        self.record(4 * gap)  # sigmoid's steepest slope is 1/4: in logits this gap is at least

    def least(self, rows: int) -> torch.Tensor:
        per_pass = [torch.stack(p).amin(0) if p else None for p in self.passes]
        return torch.full((rows,), float("inf")) if None in per_pass else torch.cat(per_pass)


def gap_after(scores: torch.Tensor, k: int) -> torch.Tensor:
    """scores [T, E] -> [T], between the k-th and the next; infinite when all are taken."""
    if k >= scores.shape[-1]:
        return torch.full(scores.shape[:-1], float("inf"))
    best = scores.topk(k + 1, dim=-1).values
    return best[..., k - 1] - best[..., k]


def transformers_forward(folder: Path, dtype: torch.dtype, margins: RouterMargins):
    """A `forward(ids)` with its own KV cache. Every tensor of the folder must be found and used."""
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    bad = {k: v for k, v in info.items() if v}
    # the multi-token-prediction layer is there to be skipped
    layers = model.config.num_hidden_layers
    bad["unexpected_keys"] = [k for k in bad.get("unexpected_keys", []) if f".layers.{layers}." not in k]
    bad = {k: v for k, v in bad.items() if v}
    if bad:
        sys.exit(f"{folder}: transformers could not read the folder that was written: {bad}")
    model.eval()
    for name, module in model.named_modules():
        if name.endswith(".gate"):
            module.register_forward_hook(margins.hook)
    cache = None

    @torch.inference_mode()
    def forward(ids):
        nonlocal cache
        out = model(ids[None], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        return out.logits[0]

    return forward


def make_golden(v: Variant, seed: int, out: Path) -> dict[str, dict]:
    """Write the checkpoint folder and its golden files into `out`; return the goldens by file name."""
    tensors, plain = to_stored(v, random_weights(v, seed))
    write_folder(v, tensors, out)
    r = random.Random(f"prompt/{v.folder}/{seed}")
    prompt = [r.randrange(3, v.config["vocab_size"]) for _ in range(v.prompt_len)]

    def paper(dtype=torch.float32, capacity=False):
        return lambda margins: PaperModel(v.config, plain, dtype, capacity, on_route=margins.record).forward

    def peer(folder, dtype=torch.float32):
        return lambda margins: transformers_forward(folder, dtype, margins)

    goldens = {}
    if v.family == "paper":
        goldens["golden"] = run_greedy(paper(), prompt)
        if v.stored == "bfloat16":
            goldens["golden-bf16"] = run_greedy(paper(torch.bfloat16), prompt)
        if v.config["capacity_factor"] is not None:
            goldens["golden-capacity"] = run_greedy(paper(capacity=True), prompt, decode_steps=0)
    elif v.stored == "fp8":
        with tempfile.TemporaryDirectory() as tmp:  # transformers reads the dequantised twin
            write_folder(v, plain, Path(tmp), stored="float32")
            goldens["golden"] = run_greedy(peer(Path(tmp)), prompt)
    else:
        goldens["golden"] = run_greedy(peer(out), prompt)
        if v.stored == "bfloat16":
            goldens["golden-bf16"] = run_greedy(peer(out, torch.bfloat16), prompt)

    import transformers

    about = json.dumps({
        "family": v.family,
        "variant": v.name,
        "seed": str(seed),
        "reference": "paper_reference.py" if v.family == "paper" else f"transformers {transformers.__version__}",
        "torch": torch.__version__,
    })  # one entry, because safetensors writes several in any order and the files should come out the same
    for name, g in goldens.items():
        save_file({k: t.contiguous() for k, t in g.items()}, out / f"{name}.safetensors", metadata={"about": about})
    return goldens


def describe(v: Variant, goldens: dict) -> str:
    g = goldens["golden"]
    line = f"{v.folder:30} logits std {g['prefill_logits'].std():5.2f}  least margin {g['top2_margin'].min():.4f}"
    line += f"  distinct tokens {len(set(g['token_ids'].tolist())):2}"
    if b := goldens.get("golden-bf16"):
        c = compare(b, g, LIMITS["bfloat16"])
        line += f"  bf16 against f32: {c.error:.1e}, undisturbed {c.undisturbed_error:.1e} ({c.undisturbed}/{c.rows} rows)"
        line += f", {c.same_tokens}/17 tokens alike"
    if d := goldens.get("golden-capacity"):
        line += f"  dropping moves the logits by {relative_error(d['prefill_logits'], g['prefill_logits']):.2f}"
    return line


def main() -> None:
    names = sorted({v.name for v in NAMED})
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--out", type=Path, required=True, help="folder to write into; one folder a variant")
    p.add_argument("--family", choices=[*FAMILIES, "all"], default="all")
    p.add_argument("--variant", default="all", help=f"all, committed, random, or one of: {', '.join(names)}")
    p.add_argument("--seed", type=int, help="default: the committed one's, or 0; required for --variant random")
    args = p.parse_args()
    torch.set_num_threads(1)

    families = FAMILIES if args.family == "all" else (args.family,)
    if args.variant == "random":
        if args.seed is None:
            p.error("--variant random needs --seed")
        chosen = [random_variant(f, args.seed) for f in families]
    else:
        chosen = [
            v
            for v in NAMED
            if v.family in families
            and (args.variant == "all" or args.variant == v.name or (args.variant == "committed" and v.folder in COMMITTED))
        ]
    if not chosen:
        p.error(f"no variant {args.variant!r} in {', '.join(families)}")
    for v in chosen:
        out = args.out / v.folder
        shutil.rmtree(out, ignore_errors=True)
        seed = COMMITTED.get(v.folder, 0) if args.seed is None else args.seed
        print(describe(v, make_golden(v, seed, out)), flush=True)


if __name__ == "__main__":
    main()
