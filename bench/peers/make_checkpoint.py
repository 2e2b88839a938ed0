#!/usr/bin/env python3
"""Random BF16 weights for a Mixtral-shaped config.json, as a sharded folder of the Hugging Face layout."""

import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file


def main() -> None:
    config_file, out, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    c = json.loads(config_file.read_text())
    out.mkdir(parents=True, exist_ok=True)
    g = torch.Generator().manual_seed(seed)
    hidden, ffn, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    q, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]

    def matrix(rows, cols):
        return (torch.randn(rows, cols, generator=g) / math.sqrt(cols)).bfloat16()

    def norm():
        return torch.ones(hidden, dtype=torch.bfloat16)

    shards = [{"model.embed_tokens.weight": matrix(vocab, hidden)}]
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}"
        layer = {f"{p}.input_layernorm.weight": norm(), f"{p}.post_attention_layernorm.weight": norm()}
        for name, rows, cols in (("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, q)):
            layer[f"{p}.self_attn.{name}_proj.weight"] = matrix(rows, cols)
        moe = f"{p}.block_sparse_moe"
        layer[f"{moe}.gate.weight"] = matrix(c["num_local_experts"], hidden)
        for e in range(c["num_local_experts"]):
            for name, rows, cols in (("w1", ffn, hidden), ("w2", hidden, ffn), ("w3", ffn, hidden)):
                layer[f"{moe}.experts.{e}.{name}.weight"] = matrix(rows, cols)
        shards.append(layer)
    shards.append({"model.norm.weight": norm(), "lm_head.weight": matrix(vocab, hidden)})

    weight_map = {}
    for n, shard in enumerate(shards, 1):
        file = f"model-{n:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(t.numel() * 2 for s in shards for t in s.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (out / "config.json").write_text(json.dumps(c, indent=2))
    (out / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))


if __name__ == "__main__":
    main()
