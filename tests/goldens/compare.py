"""How two runs of one model are compared, and how close they must be."""

from dataclasses import dataclass

import torch

# ||a - b|| / ||b|| over all rows. F32: the same sums in another order. BF16: eight bits of mantissa, a rounding at
# every matrix. FP8: the weights are exact after dequantisation; what is left is BF16 arithmetic on them.
LIMITS = {"float32": 1e-4, "bfloat16": 1e-2, "fp8": 2e-2}

# A router gap, in logits, that BF16 may flip. See RouterMargins in make_goldens.py.
ROUTER_FENCE = 0.03


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@dataclass
class Comparison:
    rows: int  # prefill rows, and decode rows for as long as both runs fed the same tokens
    error: float  # over all of them
    undisturbed: int  # rows before the first at which a router is on the fence
    undisturbed_error: float
    typical_decode_error: float  # median over the decode rows of each row's own relative error
    same_tokens: int  # greedy tokens alike before the first difference
    tokens_ok: bool  # they differ nowhere, or first where errors within the limit explain it


def compare(got: dict, want: dict, limit: float) -> Comparison:
    """Two sets of prefill_logits [P, V], decode_logits [S, V], token_ids [S + 1]; `want` has both margins too."""
    same = 0
    tokens = min(len(got["token_ids"]), len(want["token_ids"]))
    while same < tokens and got["token_ids"][same] == want["token_ids"][same]:
        same += 1
    prompt_len = len(want["prefill_logits"])
    steps = min(same, len(want["decode_logits"]))
    a = torch.cat([got["prefill_logits"], got["decode_logits"][:steps]])
    b = torch.cat([want["prefill_logits"], want["decode_logits"][:steps]])
    # after a flipped choice, attention carries the difference into every later row
    on_fence = (want["router_margin"][: len(b)] < ROUTER_FENCE).nonzero().flatten()
    calm = int(on_fence[0]) if len(on_fence) else len(b)
    row_errors = ((a - b).norm(dim=1) / b.norm(dim=1))[prompt_len:]
    tokens_ok = True
    if same < tokens:
        row = prompt_len - 1 + same
        # an error of `limit` is spread over the row; single logits move by a few times its root mean square
        reach = 4 * limit * float(b[row].pow(2).mean().sqrt())
        tokens_ok = row >= calm or float(want["top2_margin"][same]) <= reach
    return Comparison(
        rows=len(b),
        error=relative_error(a, b),
        undisturbed=calm,
        undisturbed_error=relative_error(a[:calm], b[:calm]) if calm else float("nan"),
        typical_decode_error=float(row_errors.median()) if len(row_errors) else float("nan"),
        same_tokens=same,
        tokens_ok=tokens_ok,
    )
