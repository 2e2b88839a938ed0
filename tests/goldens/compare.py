"""How two runs of one model are compared, and how close they must be."""

from dataclasses import dataclass

import torch

# ||a - b|| / ||b|| over all rows. F32: the same sums in another order. BF16: eight bits of mantissa, a rounding at
# every matrix. FP8: the weights are exact after dequantisation; what is left is BF16 arithmetic on them.
LIMITS = {"float32": 1e-4, "bfloat16": 1e-2, "fp8": 2e-2}

# A router gap, in logits, that BF16 may flip. See RouterMargins in make_goldens.py.
ROUTER_FENCE = 0.05


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@dataclass
class Comparison:
    rows: int  # prefill rows, and decode rows for as long as both runs fed the same tokens
    error: float  # over all of them
    decided: int  # rows before which, and at which, no router was on the fence
    decided_error: float
    same_tokens: int  # greedy tokens alike before the first difference
    tokens_ok: bool  # the first difference, if any, is where the margin is within the error


def compare(got: dict, want: dict) -> Comparison:
    """Two sets of prefill_logits [P, V], decode_logits [S, V], token_ids [S + 1]; `want` has router_margin too."""
    same = 0
    tokens = min(len(got["token_ids"]), len(want["token_ids"]))
    while same < tokens and got["token_ids"][same] == want["token_ids"][same]:
        same += 1
    steps = min(same, len(want["decode_logits"]))
    a = torch.cat([got["prefill_logits"], got["decode_logits"][:steps]])
    b = torch.cat([want["prefill_logits"], want["decode_logits"][:steps]])
    on_fence = (want["router_margin"][: len(b)] < ROUTER_FENCE).nonzero().flatten()
    decided = torch.ones(len(b), dtype=torch.bool)
    decided[on_fence] = False
    tokens_ok = True
    if same < tokens:
        row = len(want["prefill_logits"]) - 1 + same
        # the two logits that traded places cannot both have moved further than the largest difference of the row
        tokens_ok = float(want["top2_margin"][same]) <= 2 * float((a[row] - b[row]).abs().max())
    return Comparison(
        rows=len(b),
        error=relative_error(a, b),
        decided=int(decided.sum()),
        decided_error=relative_error(a[decided], b[decided]) if decided.any() else float("nan"),
        same_tokens=same,
        tokens_ok=tokens_ok,
    )
