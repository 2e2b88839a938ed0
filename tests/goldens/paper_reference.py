"""The `moesaic_paper` model in plain PyTorch: what the Rust forward of that family is held against.

Legend: T new tokens, S tokens so far, D model, H heads, G key-value heads, E experts, K top-k.
One sequence, no batch dimension. Slow on purpose: every line is one line of the description.
"""

import math

import torch
import torch.nn.functional as F


def rms_norm(x, weight, eps):
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def rope_angles(positions, dim, theta):
    """cos, sin [T, dim / 2]."""
    inv_freq = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angles = positions.float()[:, None] * inv_freq
    return angles.cos(), angles.sin()


def rope_halves(x, cos, sin):
    """x [T, H, dim], rotating (i, i + dim / 2)."""
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def rope_pairs(x, cos, sin):
    """x [T, H, dim], rotating (2i, 2i + 1), as DeepSeek's checkpoints are laid out."""
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def causal_attention(q, k, v, scale):
    """q [T, H, d], k [S, H, d], v [S, H, dv] -> [T, H * dv]; the T queries are the last of the S positions."""
    T, S = q.shape[0], k.shape[0]
    scores = torch.einsum("thd,shd->hts", q, k) * scale
    future = torch.ones(T, S, dtype=torch.bool).tril(S - T).logical_not()
    scores = scores.float().masked_fill(future, float("-inf"))
    p = scores.softmax(-1).to(q.dtype)
    return torch.einsum("hts,shd->thd", p, v).flatten(1)


def route(probs, top_k, norm_topk_prob, capacity_factor=None, drop_policy="probs"):
    """probs [T, E] -> gates [T, E], zero where an expert was not chosen or dropped the token.

    Gates are normalised over the chosen experts first, dropped afterwards: what is dropped is lost, its
    neighbours do not grow. An expert keeps C = ceil(factor * K * T / E) tokens: the largest gates ("probs", the
    earlier token on a tie) or the earliest tokens ("position").
    """
    T, E = probs.shape
    chosen, idx = probs.topk(top_k, dim=-1)
    if norm_topk_prob:
        chosen = chosen / chosen.sum(-1, keepdim=True)
    gates = torch.zeros_like(probs).scatter(1, idx, chosen)
    if capacity_factor is None:
        return gates
    capacity = math.ceil(capacity_factor * top_k * T / E)
    picked = torch.zeros_like(probs, dtype=torch.bool).scatter(1, idx, True)
    for e in range(E):
        tokens = picked[:, e].nonzero().flatten()
        if drop_policy == "probs":
            tokens = tokens[gates[tokens, e].argsort(descending=True, stable=True)]
        gates[tokens[capacity:], e] = 0.0
    return gates


class PaperModel:
    def __init__(self, config: dict, weights: dict, dtype=torch.float32, capacity=False, on_route=None):
        """`capacity`: obey the config's capacity_factor and drop_policy (inference ignores them by default).

        `on_route`: told, for every MoE layer, each token's gap between its last chosen expert and the next.
        """
        self.c = config
        self.w = {name: t.to(dtype) for name, t in weights.items()}
        self.capacity_factor = config["capacity_factor"] if capacity else None
        self.on_route = on_route or (lambda gap: None)
        self.cache = [None] * config["num_hidden_layers"]
        self.seen = 0

    def linear(self, x, name):
        return F.linear(x, self.w[name + ".weight"])

    def norm(self, x, name):
        return rms_norm(x, self.w[name + ".weight"], self.c["rms_norm_eps"])

    def extend(self, layer, *new):
        """Append to the layer's cache, return everything so far."""
        old = self.cache[layer]
        self.cache[layer] = new if old is None else tuple(torch.cat([o, n]) for o, n in zip(old, new))
        return self.cache[layer]

    def gqa(self, x, p, layer, positions):
        c = self.c
        T, H, G, dim = len(x), c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        cos, sin = rope_angles(positions, dim, c["rope_theta"])
        q = rope_halves(self.linear(x, f"{p}.q_proj").view(T, H, dim), cos, sin)
        k = rope_halves(self.linear(x, f"{p}.k_proj").view(T, G, dim), cos, sin)
        v = self.linear(x, f"{p}.v_proj").view(T, G, dim)
        k, v = self.extend(layer, k, v)
        k, v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)
        return self.linear(causal_attention(q, k, v, dim**-0.5), f"{p}.o_proj")

    def mla(self, x, p, layer, positions):
        c = self.c
        T, H = len(x), c["num_attention_heads"]
        nope, rope, v_dim = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
        cos, sin = rope_angles(positions, rope, c["rope_theta"])
        if c["q_lora_rank"] is None:
            q = self.linear(x, f"{p}.q_proj")
        else:
            q = self.linear(self.latent_norm(self.linear(x, f"{p}.q_a_proj"), f"{p}.q_a_layernorm"), f"{p}.q_b_proj")
        q_nope, q_rope = q.view(T, H, nope + rope).split([nope, rope], -1)
        q = torch.cat([q_nope, rope_pairs(q_rope, cos, sin)], -1)
        latent, k_rope = self.linear(x, f"{p}.kv_a_proj_with_mqa").split([c["kv_lora_rank"], rope], -1)
        latent = self.latent_norm(latent, f"{p}.kv_a_layernorm")
        latent, k_rope = self.extend(layer, latent, rope_pairs(k_rope[:, None], cos, sin))
        kv = self.linear(latent, f"{p}.kv_b_proj").view(len(latent), H, nope + v_dim)
        k_nope, v = kv.split([nope, v_dim], -1)
        k = torch.cat([k_nope, k_rope.expand(-1, H, -1)], -1)
        return self.linear(causal_attention(q, k, v, (nope + rope) ** -0.5), f"{p}.o_proj")

    def latent_norm(self, x, name):
        # DeepSeek's two latent norms keep the layer's default of 1e-6 whatever rms_norm_eps is
        return rms_norm(x, self.w[name + ".weight"], 1e-6)

    def mlp(self, x, p, gated):
        if gated:
            inner = F.silu(self.linear(x, f"{p}.gate_proj")) * self.linear(x, f"{p}.up_proj")
        else:
            inner = F.gelu(self.linear(x, f"{p}.up_proj"), approximate="tanh")
        return self.linear(inner, f"{p}.down_proj")

    def moe(self, x, p):
        c = self.c
        logits = self.linear(x, f"{p}.gate").float()
        best = F.pad(logits, (0, 1), value=float("-inf")).topk(c["num_experts_per_tok"] + 1, dim=-1).values
        self.on_route(best[:, -2] - best[:, -1])
        probs = logits.softmax(-1)
        gates = route(probs, c["num_experts_per_tok"], c["norm_topk_prob"], self.capacity_factor, c["drop_policy"])
        out = torch.zeros_like(x, dtype=torch.float32)
        for e in range(c["num_experts"]):
            tokens = gates[:, e].nonzero().flatten()
            if len(tokens):
                y = self.mlp(x[tokens], f"{p}.experts.{e}", c["expert_type"] == "swiglu")
                out[tokens] += gates[tokens, e, None] * y.float()
        return out.to(x.dtype)

    @torch.inference_mode()
    def forward(self, ids):
        """ids [T] -> logits [T, vocabulary], appending to the cache."""
        positions = torch.arange(self.seen, self.seen + len(ids))
        self.seen += len(ids)
        x = self.w["model.embed_tokens.weight"][ids]
        for i in range(self.c["num_hidden_layers"]):
            p = f"model.layers.{i}"
            attention = self.mla if self.c["attention"] == "mla" else self.gqa
            x = x + attention(self.norm(x, f"{p}.input_layernorm"), f"{p}.self_attn", i, positions)
            y = self.norm(x, f"{p}.post_attention_layernorm")
            dense = i < self.c["first_k_dense_replace"]
            x = x + (self.mlp(y, f"{p}.mlp", True) if dense else self.moe(y, f"{p}.mlp"))
        x = self.norm(x, "model.norm")
        return self.linear(x, "model.embed_tokens" if self.c["tie_word_embeddings"] else "lm_head")
