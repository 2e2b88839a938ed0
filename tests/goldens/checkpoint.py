"""Random weights for a variant, and the folder as the Hugging Face hub would hold it."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from variants import Variant

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FP8_BLOCK = 128
FP8_MAX = 448.0  # largest finite E4M3 value


def random_weights(v: Variant, seed: int) -> dict[str, torch.Tensor]:
    """Every tensor of the model by its published (per-expert) name, F32.

    Matrices have gain / sqrt(fan_in): with RMS-normed inputs, router and output logits then have a spread of
    about two, so that experts differ, softmaxes are neither flat nor one-hot and the best two tokens are apart.
    What is added to the residual stream is smaller than what is in it, as in a trained model.
    """
    c = v.config
    g = torch.Generator().manual_seed(seed)
    hidden, vocab, layers = c["hidden_size"], c["vocab_size"], c["num_hidden_layers"]
    weights: dict[str, torch.Tensor] = {}

    def matrix(name, rows, cols, gain=1.0):
        weights[name + ".weight"] = torch.randn(rows, cols, generator=g) * (gain / math.sqrt(cols))

    def norm(name, n):
        weights[name + ".weight"] = 1.0 + 0.2 * torch.randn(n, generator=g)

    def swiglu(prefix, inner, names=("gate_proj", "up_proj", "down_proj"), gated=True):
        gate, up, down = names
        if gated:
            matrix(f"{prefix}.{gate}", inner, hidden, 1.5)
        matrix(f"{prefix}.{up}", inner, hidden, 1.5)
        matrix(f"{prefix}.{down}", hidden, inner, 0.6)

    def gqa(p):
        heads, kv = c["num_attention_heads"], c["num_key_value_heads"]
        dim = c.get("head_dim") or hidden // heads
        matrix(f"{p}.q_proj", heads * dim, hidden, 1.5)
        matrix(f"{p}.k_proj", kv * dim, hidden, 1.5)
        matrix(f"{p}.v_proj", kv * dim, hidden)
        matrix(f"{p}.o_proj", hidden, heads * dim, 0.6)
        if v.family == "qwen3_moe":
            norm(f"{p}.q_norm", dim)
            norm(f"{p}.k_norm", dim)
        if v.family == "olmoe":
            norm(f"{p}.q_norm", heads * dim)
            norm(f"{p}.k_norm", kv * dim)

    def mla(p):
        heads, nope, rope = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"]
        if c["q_lora_rank"] is None:
            matrix(f"{p}.q_proj", heads * (nope + rope), hidden, 1.5)
        else:
            matrix(f"{p}.q_a_proj", c["q_lora_rank"], hidden)
            norm(f"{p}.q_a_layernorm", c["q_lora_rank"])
            matrix(f"{p}.q_b_proj", heads * (nope + rope), c["q_lora_rank"], 1.5)
        matrix(f"{p}.kv_a_proj_with_mqa", c["kv_lora_rank"] + rope, hidden)
        norm(f"{p}.kv_a_layernorm", c["kv_lora_rank"])
        matrix(f"{p}.kv_b_proj", heads * (nope + c["v_head_dim"]), c["kv_lora_rank"], 1.2)
        matrix(f"{p}.o_proj", hidden, heads * c["v_head_dim"], 0.6)

    def moe(p):
        experts = c.get("num_experts") or c.get("num_local_experts") or c.get("n_routed_experts")
        inner = c.get("moe_intermediate_size") or c["intermediate_size"]
        matrix(f"{p}.gate", experts, hidden, 2.0)
        names = ("w1", "w3", "w2") if v.family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        for e in range(experts):
            swiglu(f"{p}.experts.{e}", inner, names, gated=c.get("expert_type") != "gelu")
        if v.family == "deepseek_v3":
            weights[f"{p}.gate.e_score_correction_bias"] = 0.2 * torch.randn(experts, generator=g)
            swiglu(f"{p}.shared_experts", inner * c["n_shared_experts"])

    def layer(i):
        p = f"model.layers.{i}"
        norm(f"{p}.input_layernorm", hidden)
        (mla if v.family == "deepseek_v3" or c.get("attention") == "mla" else gqa)(f"{p}.self_attn")
        norm(f"{p}.post_attention_layernorm", hidden)
        if is_dense(v, i):
            swiglu(f"{p}.mlp", c["intermediate_size"])
        else:
            moe(f"{p}.block_sparse_moe" if v.family == "mixtral" else f"{p}.mlp")

    tied = c["tie_word_embeddings"]
    embed = torch.randn(vocab, hidden, generator=g) * (2.0 / math.sqrt(hidden) if tied else 1.0)
    weights["model.embed_tokens.weight"] = embed
    for i in range(layers):
        layer(i)
    if v.mtp:  # layer `layers` of a published DeepSeek checkpoint: a decoder layer and its own head
        p = f"model.layers.{layers}"
        layer(layers)
        norm(f"{p}.enorm", hidden)
        norm(f"{p}.hnorm", hidden)
        matrix(f"{p}.eh_proj", hidden, 2 * hidden)
        weights[f"{p}.embed_tokens.weight"] = embed.clone()
        matrix(f"{p}.shared_head.head", vocab, hidden)
        norm(f"{p}.shared_head.norm", hidden)
    norm("model.norm", hidden)
    if not tied:
        matrix("lm_head", vocab, hidden, 2.0)
    return weights


def is_dense(v: Variant, layer: int) -> bool:
    c = v.config
    if v.family == "qwen3_moe":
        return layer in c["mlp_only_layers"] or (layer + 1) % c["decoder_sparse_step"] != 0
    return v.family in ("deepseek_v3", "paper") and layer < c["first_k_dense_replace"]


def fuse_experts(weights: dict, family: str) -> dict:
    """Per-expert matrices to `experts.gate_up_proj` [E, 2F, D] and `experts.down_proj` [E, D, F]."""
    gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    out, blocks = {}, {}
    for name, t in weights.items():
        if family == "mixtral":
            name = name.replace(".block_sparse_moe.", ".mlp.")
        head, sep, tail = name.partition(".experts.")
        if not sep:
            out[name] = t
            continue
        expert, part, _ = tail.split(".")
        blocks.setdefault(head, {}).setdefault(part, {})[int(expert)] = t
    for head, parts in blocks.items():
        experts = range(len(parts[down]))
        out[f"{head}.experts.gate_up_proj"] = torch.stack([torch.cat([parts[gate][e], parts[up][e]]) for e in experts])
        out[f"{head}.experts.down_proj"] = torch.stack([parts[down][e] for e in experts])
    return out


def quantise_fp8(weights: dict) -> tuple[dict, dict]:
    """(stored, dequantised): the matrices that DeepSeek quantises, as E4M3 with one F32 scale a 128x128 block."""
    stored, plain = {}, {}
    for name, t in weights.items():
        quantised = "_proj" in name and t.ndim == 2 and ".layers." in name and "eh_proj" not in name
        if not quantised:
            t = t.to(torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16)
            stored[name], plain[name] = t, t.float()
            continue
        rows, cols = t.shape
        row_block = torch.arange(rows) // FP8_BLOCK
        col_block = torch.arange(cols) // FP8_BLOCK
        scale = torch.zeros(int(row_block[-1]) + 1, int(col_block[-1]) + 1)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                block = t[i * FP8_BLOCK : (i + 1) * FP8_BLOCK, j * FP8_BLOCK : (j + 1) * FP8_BLOCK]
                scale[i, j] = block.abs().max() / FP8_MAX
        full = scale[row_block][:, col_block]
        q = (t / full).to(torch.float8_e4m3fn)
        stored[name], stored[name + "_scale_inv"] = q, scale
        plain[name] = q.float() * full
    return stored, plain


def to_stored(v: Variant, weights: dict) -> tuple[dict, dict]:
    """(tensors as written, the same values in F32)."""
    if v.stored == "fp8":
        return quantise_fp8(weights)
    dtype = DTYPES[v.stored]
    # DeepSeek keeps the router's correction bias in F32 whatever the rest is
    stored = {n: t if n.endswith("e_score_correction_bias") else t.to(dtype) for n, t in weights.items()}
    if v.spelling == "fused":
        stored = fuse_experts(stored, v.family)
    return stored, {n: t.float() for n, t in stored.items()}


def write_folder(v: Variant, tensors: dict, out: Path, stored: str | None = None) -> None:
    stored = stored or v.stored
    out.mkdir(parents=True, exist_ok=True)
    for old in [*out.glob("model*.safetensors*"), *out.glob("*.json")]:
        old.unlink()
    write_config(v, out, stored)
    keep = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = {"_from_model_config": True} | {k: v.config[k] for k in keep if k in v.config}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")

    tensors = {n: t.contiguous() for n, t in tensors.items()}
    if v.shards == 1:
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    per_shard = math.ceil(len(names) / v.shards)
    weight_map = {}
    for s in range(v.shards):
        file = f"model-{s + 1:05d}-of-{v.shards:05d}.safetensors"
        part = names[s * per_shard : (s + 1) * per_shard]
        save_file({n: tensors[n] for n in part}, out / file, metadata={"format": "pt"})
        weight_map |= {n: file for n in part}
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_config(v: Variant, out: Path, stored: str) -> None:
    config = {k: x for k, x in v.config.items() if not (k == "head_dim" and x is None)}
    dtype = "bfloat16" if stored == "fp8" else stored
    if v.family == "paper":
        config["dtype"] = dtype
    elif v.config_form == "v4":
        config |= dict(torch_dtype=dtype, transformers_version="4.57.0", use_cache=True)
        if stored == "fp8":
            config["quantization_config"] = dict(
                activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=[FP8_BLOCK, FP8_BLOCK]
            )
    else:  # whatever the installed transformers writes
        from transformers import AutoConfig

        config.pop("model_type")
        c = AutoConfig.for_model(v.family, **config)
        c.dtype = dtype
        c.save_pretrained(out)
        return
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
