#!/usr/bin/env python3
"""How long moesaic and AIConfigurator search for a deployment: the same models, GPUs, lengths and goals, in one run.

Only the time of the search is compared. A peer's predictions are not looked at. CPU seconds are what counts on a machine
that others use, too.

    pip install aiconfigurator aiconfigurator-core
    bench/peers/aiconfigurator.py target/release/moesaic --aiconfigurator aiconfigurator --rounds 3
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TIMEOUT_S = 1800
INPUT, OUTPUT, TTFT_MS, TPOT_MS = 4000, 1000, 2000, 50

# our name, its name, our cluster, GPUs
CASES = [
    ("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", "hgx-h200", 8),
    ("deepseek-v3", "deepseek-ai/DeepSeek-V3", "hgx-h200", 32),
]


def timed(command: list, cwd: Path) -> dict:
    """Seconds on the clock and on the cores, and the exit code."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT_S)
    seconds = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if done.returncode != 0:
        sys.exit(f"{' '.join(str(c) for c in command)}\nexit code {done.returncode}: {done.stderr.strip()[-2000:]}")
    return {"seconds": seconds, "cpu_seconds": cpu}


def ours(args, case: tuple, folder: Path) -> list:
    model, _, cluster, gpus = case
    workload = folder / "workload.yaml"
    workload.write_text(f"name: peer\nnum_requests: 1\ninput_tokens: {INPUT}\noutput_tokens: {OUTPUT}\nseed: 0\n")
    command = [args.moesaic.resolve(), "plan", model, "--cluster", cluster, "--gpus", gpus, "--workload", workload]
    return command + ["--ttft", f"{TTFT_MS}ms", "--tpot", f"{TPOT_MS}ms", "--output", folder / "plan", "--json"]


def theirs(args, case: tuple, _: Path) -> list:
    command = [args.aiconfigurator, "cli", "default", "--model-path", case[1], "--total-gpus", case[3]]
    command += ["--system", "h200_sxm", "--isl", INPUT, "--osl", OUTPUT, "--ttft", TTFT_MS, "--tpot", TPOT_MS]
    return command + ["--backend", args.backend, "--serving-mode", "agg"]


def version(command: list) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    return (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("moesaic", type=Path)
    parser.add_argument("--aiconfigurator", default="aiconfigurator", help="its command")
    parser.add_argument("--backend", default="trtllm", help="the system whose tables it takes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    commit = version(["git", "-C", Path(__file__).parent, "rev-parse", "--short", "HEAD"])
    result = {
        "commit": commit,
        "moesaic": version([args.moesaic, "--version"]),
        "aiconfigurator": version([args.aiconfigurator, "version"]),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "load_average": os.getloadavg()[0],
        "input_tokens": INPUT,
        "output_tokens": OUTPUT,
        "goals_ms": {"ttft": TTFT_MS, "tpot": TPOT_MS},
        "cases": [],
    }
    for case in CASES:
        rounds = {"moesaic": [], "aiconfigurator": []}
        for _ in range(args.rounds):
            for peer, command in (("moesaic", ours), ("aiconfigurator", theirs)):
                with tempfile.TemporaryDirectory() as folder:
                    rounds[peer].append(timed(command(args, case, Path(folder)), Path(folder)))
        median = {
            peer: {key: statistics.median(sample[key] for sample in samples) for key in samples[0]}
            for peer, samples in rounds.items()
        }
        ratio = {key: median["aiconfigurator"][key] / median["moesaic"][key] for key in median["moesaic"]}
        result["cases"].append({"model": case[0], "gpus": case[3], "median": median, "ratio": ratio})
        print(f"{case[0]} on {case[3]} H200:", flush=True)
        for peer, figures in median.items():
            print(f"  {peer:<15} {figures['seconds']:8.2f} s   {figures['cpu_seconds']:8.2f} s of CPU", flush=True)
        print(f"  ratio           {ratio['seconds']:8.0f}     {ratio['cpu_seconds']:8.0f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
