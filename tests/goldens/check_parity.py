#!/usr/bin/env python3
"""Hold a moesaic binary against PyTorch on models that it has not seen. See README.md beside this file."""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from compare import LIMITS, compare, relative_error
from make_goldens import DECODE_STEPS, make_golden
from safetensors.torch import load_file
from variants import COMMITTED, FAMILIES, NAMED, random_variant

TIMEOUT_S = 120


def run_moesaic(binary: Path, folder: Path, golden: dict, dtype: str, max_tokens: int, extra=()) -> dict:
    """One `generate`, returning what it wrote with --logits."""
    logits = folder / f"ours-{dtype}.safetensors"
    logits.unlink(missing_ok=True)
    command = [str(binary), "generate", "--model", str(folder)]
    command += ["--prompt-ids", ",".join(str(t) for t in golden["prompt_ids"].tolist())]
    command += ["--max-tokens", str(max_tokens), "--temperature", "0", "--ignore-eos"]
    command += ["--dtype", dtype, "--logits", str(logits), "--json", *extra]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr.strip()[-300:]}")
    ours = load_file(logits)
    for name in ("prefill_logits", "decode_logits", "token_ids"):
        want = list(golden[name].shape)
        got = list(ours[name].shape) if name in ours else None
        if got != want:
            raise RuntimeError(f"{logits.name}: {name} has shape {got}, expected {want}")
    return ours


def check_variant(binary: Path, v, seed: int, folder: Path) -> list[tuple[str, bool]]:
    goldens = make_golden(v, seed, folder)
    golden = goldens["golden"]
    rows = []

    def row(what, ok, text):
        rows.append((f"{v.folder:28} {seed:4} {v.stored:9}{what:18} {'ok  ' if ok else 'FAIL'} {text}", ok))

    def attempt(what, dtype, body, want, max_tokens, extra=()):
        try:
            body(run_moesaic(binary, folder, want, dtype, max_tokens, extra))
        except (RuntimeError, OSError, subprocess.TimeoutExpired) as e:
            row(what, False, str(e))

    def float32(ours):
        limit = LIMITS["fp8" if v.stored == "fp8" else "float32"]
        c = compare(ours, golden, limit)
        ok = c.error <= limit and c.tokens_ok
        row("float32", ok, f"error {c.error:.1e} (limit {limit:.0e}), {c.same_tokens}/{DECODE_STEPS + 1} tokens")

    def bfloat16(ours):
        limit = decode_limit = LIMITS["fp8" if v.stored == "fp8" else "bfloat16"]
        text, tokens_ok = "", True
        if peer := goldens.get("golden-bf16"):
            # arithmetic in BF16 cannot be asked to be nearer to F32 than PyTorch's
            p = compare(peer, golden, limit)
            limit = max(limit, p.undisturbed_error)
            decode_limit = max(decode_limit, 1.5 * p.typical_decode_error)
            between = compare(ours, peer, 2 * limit)  # both have errors
            tokens_ok = between.tokens_ok
            text = f"; PyTorch's own {p.undisturbed_error:.1e} and {p.typical_decode_error:.1e}"
            text += f"; between the two {between.undisturbed_error:.1e}, {between.same_tokens}/{DECODE_STEPS + 1} tokens"
        c = compare(ours, golden, limit)
        # written so that nothing to compare (NaN) passes
        ok = not c.undisturbed_error > limit and not c.typical_decode_error > decode_limit
        text = (
            f"error {c.undisturbed_error:.1e} (limit {limit:.1e}) on {c.undisturbed}/{c.rows} undisturbed rows, "
            f"typical decode row {c.typical_decode_error:.1e} (limit {decode_limit:.1e}){text}"
        )
        row("bfloat16", ok and tokens_ok and c.tokens_ok, text)

    def capacity(ours):
        error = relative_error(ours["prefill_logits"], goldens["golden-capacity"]["prefill_logits"])
        row("float32 capacity", error <= LIMITS["float32"], f"error {error:.1e} (limit {LIMITS['float32']:.0e})")

    attempt("float32", "float32", float32, golden, DECODE_STEPS + 1)
    if v.stored in ("bfloat16", "fp8"):
        attempt("bfloat16", "bfloat16", bfloat16, golden, DECODE_STEPS + 1)
    if "golden-capacity" in goldens:
        flags = ["--moe-expert-capacity-factor", str(v.config["capacity_factor"])]
        flags += ["--moe-token-drop-policy", v.config["drop_policy"]]
        attempt("float32 capacity", "float32", capacity, goldens["golden-capacity"], 1, flags)
    return rows


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("binary", type=Path, help="the moesaic binary, for instance target/release/moesaic")
    p.add_argument("--family", choices=[*FAMILIES, "all"], default="all")
    p.add_argument("--random", type=int, default=5, metavar="N", help="random models of each family")
    p.add_argument("--named", action="store_true", help="every named variant as well")
    p.add_argument("--seed", type=int, default=1000, help="first seed")
    p.add_argument("--keep", type=Path, help="write the models here and leave them")
    args = p.parse_args()
    torch.set_num_threads(1)
    if not args.binary.is_file():
        p.error(f"no such binary: {args.binary}")

    families = FAMILIES if args.family == "all" else (args.family,)
    cases = [(random_variant(f, s), s) for f in families for s in range(args.seed, args.seed + args.random)]
    if args.named:
        cases += [(v, args.seed + COMMITTED.get(v.folder, 0)) for v in NAMED if v.family in families]

    failed = total = 0
    with tempfile.TemporaryDirectory() as tmp:
        for v, seed in cases:
            for line, ok in check_variant(args.binary, v, seed, (args.keep or Path(tmp)) / v.folder):
                print(line, flush=True)
                total += 1
                failed += not ok
    print(f"{total - failed} of {total} comparisons within their limits")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
