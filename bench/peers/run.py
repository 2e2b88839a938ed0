#!/usr/bin/env python3
"""moesaic, llama.cpp and transformers on the same weights, one after another, several rounds in one run."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
OURS, LLAMA, HF = "moesaic", "llama.cpp", "transformers"
TIMEOUT_S = 600

# (peer, "prefill" or "decode", batch size) -> tokens a second, one value a round
Samples = dict[tuple[str, str, int], list[float]]


def run(command: list, **kwargs) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=TIMEOUT_S, **kwargs)
    if done.returncode != 0:
        sys.exit(f"{' '.join(str(c) for c in command)}\nexit code {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def prepare(args) -> tuple[Path, Path]:
    """The checkpoint folder and its GGUF twin, made once."""
    model, gguf = args.work / "model", args.work / "model-bf16.gguf"
    if not (model / "config.json").exists():
        print(f"writing random weights to {model}", flush=True)
        if args.moesaic:
            run([args.moesaic, "init", "--config", args.config, "--output", model, "--seed", "0"])
        else:
            run([sys.executable, HERE / "make_checkpoint.py", args.config, model, "0"])
    if not gguf.exists() and LLAMA in args.only:
        print(f"converting to {gguf}", flush=True)
        run([sys.executable, HERE / "to_gguf.py", args.peers / "llama.cpp", model, gguf])
    return model, gguf


def measure_ours(args, model: Path, samples: Samples) -> None:
    report = args.work / "moesaic-latency.json"
    sizes = ",".join(str(batch) for batch in args.batch_sizes)
    command = [args.moesaic, "bench", "latency", "--model", model, "--input-len", args.input_len]
    command += ["--output-len", args.output_len, "--batch-size", sizes, "--num-threads", args.threads]
    command += ["--json", report, *args.moesaic_arg]
    run(command)
    for r in json.loads(report.read_text())["results"]:
        samples.setdefault((OURS, "prefill", r["batch_size"]), []).append(r["prefill_tokens_per_s"])
        samples.setdefault((OURS, "decode", r["batch_size"]), []).append(r["decode_tokens_per_s"])


def measure_llama(args, gguf: Path, samples: Samples) -> None:
    context = max(args.batch_sizes) * (args.input_len + args.output_len)
    command = [args.peers / "llama-build/bin/llama-batched-bench", "-m", gguf, "-c", context, "-b", 2048, "-ub", 512]
    command += ["-npp", args.input_len, "-ntg", args.output_len, "-npl", ",".join(str(b) for b in args.batch_sizes)]
    command += ["-t", args.threads, "-tb", args.threads, "--output-format", "jsonl"]
    lines = [json.loads(line) for line in run(command).splitlines() if line.startswith("{")]
    assert [line["pl"] for line in lines] == args.batch_sizes, lines
    for line in lines:
        samples.setdefault((LLAMA, "prefill", line["pl"]), []).append(line["speed_pp"])
        samples.setdefault((LLAMA, "decode", line["pl"]), []).append(line["speed_tg"])


def measure_transformers(args, model: Path, samples: Samples, versions: dict) -> None:
    """Every setting is measured; a cell of the table takes the setting that was best there in this round."""
    command = [sys.executable, HERE / "peer_transformers.py", "--model", model, "--threads", args.threads]
    command += ["--input-len", args.input_len, "--output-len", args.output_len, "--settings", args.hf_settings]
    command += ["--batch-sizes", ",".join(str(b) for b in args.batch_sizes)]
    r = json.loads(run(command).splitlines()[-1])
    versions |= {HF: r["transformers"], "torch": r["torch"]}
    for batch in args.batch_sizes:
        for phase in ("prefill", "decode"):
            best = max(s[str(batch)][f"{phase}_tokens_per_s"] for s in r["results"].values())
            samples.setdefault((HF, phase, batch), []).append(best)


def table(samples: Samples, batch_sizes: list[int]) -> str:
    peers = [p for p in (OURS, LLAMA, HF) if any(key[0] == p for key in samples)]
    ratio = f"{OURS} / better peer" if OURS in peers and len(peers) > 1 else ""
    lines = [f"| tokens/s: median (min to max) | {' | '.join(peers)} | {ratio} |", "| --- " * (len(peers) + 2) + "|"]
    for phase in ("prefill", "decode"):
        for batch in batch_sizes:
            cells, median = [], {}
            for p in peers:
                s = samples[p, phase, batch]
                median[p] = statistics.median(s)
                cells.append(f"{median[p]:,.1f} ({min(s):,.1f} to {max(s):,.1f})")
            better = max((median[p] for p in peers if p != OURS), default=0.0)
            cells.append(f"{median[OURS] / better:.2f}" if ratio else "")
            lines.append(f"| {phase}, batch {batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cpu_model() -> dict:
    info = {"machine": platform.machine(), "logical_cpus": os.cpu_count()}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name":
            info.setdefault("model", value)
        elif key == "flags":
            wanted = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")
            info.setdefault("isa", [f for f in wanted if f in value.split()])
    return info


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("moesaic", type=Path, nargs="?", help="the moesaic binary; left out, only the peers are measured")
    p.add_argument("--peers", type=Path, required=True, help="the folder that setup.sh filled")
    p.add_argument("--work", type=Path, help="checkpoint and GGUF file, kept between runs; default: the peers' folder")
    p.add_argument("--config", type=Path, default=HERE / "model.json")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--input-len", type=int, default=512)
    p.add_argument("--output-len", type=int, default=64)
    p.add_argument("--batch-sizes", type=lambda s: [int(b) for b in s.split(",")], default=[1, 4, 16])
    p.add_argument("--only", type=lambda s: s.split(","), default=[OURS, LLAMA, HF], help="peers, comma-separated")
    p.add_argument("--hf-settings", default="grouped_mm/dynamic,grouped_mm/static", help="EXPERTS/CACHE, comma-separated")
    p.add_argument("--moesaic-arg", action="append", default=[], help="passed on to `moesaic bench latency`")
    p.add_argument("--output", type=Path, default=Path("peers.json"), help="where the results go as JSON")
    args = p.parse_args()
    if args.moesaic is None:
        args.only = [peer for peer in args.only if peer != OURS]
    args.work = args.work or args.peers
    args.work.mkdir(parents=True, exist_ok=True)
    # two threads means the same for everyone: the processes stay on the first `threads` CPUs they may use
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    os.environ["OMP_NUM_THREADS"] = str(args.threads)

    model, gguf = prepare(args)
    samples: Samples = {}
    sources = (args.peers / "llama.cpp").resolve().parents[1].name
    versions = {"python": platform.python_version(), LLAMA: f"the one in {sources}"}
    if OURS in args.only:
        versions[OURS] = run([args.moesaic, "--version"]).strip()
    load = []
    for r in range(args.rounds):
        load.append(os.getloadavg()[0])
        for peer in args.only:
            start = time.monotonic()
            if peer == OURS:
                measure_ours(args, model, samples)
            elif peer == LLAMA:
                measure_llama(args, gguf, samples)
            elif peer == HF:
                measure_transformers(args, model, samples, versions)
            else:
                p.error(f"unknown peer {peer!r}: {OURS}, {LLAMA} or {HF}")
            print(f"round {r + 1} of {args.rounds}, {peer}: {time.monotonic() - start:.0f} s", flush=True)

    print(f"\ninput {args.input_len}, output {args.output_len}, {args.threads} threads, {args.rounds} rounds\n")
    print(table(samples, args.batch_sizes))
    commit = run(["git", "-C", HERE, "rev-parse", "HEAD"]).strip()
    result = {
        "commit": commit,
        "command": "bench/peers/run.py " + " ".join(a for a in sys.argv[1:] if not a.startswith("/")),
        "cpu": cpu_model(),
        "versions": versions,
        "threads": args.threads,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "load_average_before_each_round": load,
        "model": json.loads((model / "config.json").read_text()),
        "tokens_per_s": [
            {"peer": peer, "phase": phase, "batch_size": batch, "samples": s}
            for (peer, phase, batch), s in samples.items()
        ],
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten to {args.output}")


if __name__ == "__main__":
    main()
