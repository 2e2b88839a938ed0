"""The model shapes that parity is held on: named ones, and random ones from a seed.

A variant is a small model (`config`, in the spelling of transformers 4) plus how its folder is written
(`stored` dtype, `spelling` of the experts, `config_form`, number of `shards`). Every named variant exists to
pin one thing down; the random ones are there so that nothing fits the named ones by accident.
"""

import random
from dataclasses import dataclass, field

FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "paper")


@dataclass
class Variant:
    family: str
    name: str
    config: dict
    stored: str = "bfloat16"  # float32 | bfloat16 | float16 | fp8 (128x128 blocks with weight_scale_inv)
    spelling: str = "per_expert"  # per_expert (as published checkpoints) | fused (as transformers 5 holds them)
    config_form: str = "v4"  # v4: rope_theta, rope_scaling, torch_dtype | v5: rope_parameters, dtype
    shards: int = 1
    prompt_len: int = 13
    mtp: bool = False  # deepseek_v3: write the tensors of the multi-token-prediction layer, to be skipped
    seed: int = 0

    @property
    def folder(self) -> str:
        return self.family if self.name == "base" else f"{self.family}-{self.name}"


COMMON = dict(
    vocab_size=96,
    hidden_size=36,
    num_hidden_layers=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    rope_theta=10000.0,
    rope_scaling=None,
)

BASE = {
    # 3 query heads on 1 key-value head, head_dim * heads != hidden_size
    "mixtral": COMMON
    | dict(
        architectures=["MixtralForCausalLM"],
        model_type="mixtral",
        hidden_act="silu",
        attention_dropout=0.0,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=20,
        intermediate_size=40,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=None,
        rope_theta=1e6,
    ),
    "qwen3_moe": COMMON
    | dict(
        architectures=["Qwen3MoeForCausalLM"],
        model_type="qwen3_moe",
        hidden_act="silu",
        attention_bias=False,
        attention_dropout=0.0,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=56,
        moe_intermediate_size=24,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        rms_norm_eps=1e-6,
        rope_theta=1e6,
    ),
    "olmoe": COMMON
    | dict(
        architectures=["OlmoeForCausalLM"],
        model_type="olmoe",
        hidden_size=40,
        hidden_act="silu",
        attention_bias=False,
        attention_dropout=0.0,
        clip_qkv=None,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=24,
        num_experts=8,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        pad_token_id=0,
    ),
    "deepseek_v3": COMMON
    | dict(
        architectures=["DeepseekV3ForCausalLM"],
        model_type="deepseek_v3",
        hidden_act="silu",
        attention_bias=False,
        attention_dropout=0.0,
        num_attention_heads=3,
        num_key_value_heads=3,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=14,
        intermediate_size=56,
        moe_intermediate_size=24,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        moe_layer_freq=1,
        first_k_dense_replace=1,
        num_nextn_predict_layers=0,
        rms_norm_eps=1e-6,
        rope_scaling=dict(
            type="yarn",
            factor=4.0,
            original_max_position_embeddings=64,
            beta_fast=32,
            beta_slow=1,
            mscale=1.0,
            mscale_all_dim=1.0,
        ),
    ),
    "paper": dict(
        model_type="moesaic_paper",
        vocab_size=96,
        hidden_size=36,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=12,
        attention="gqa",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        intermediate_size=60,
        first_k_dense_replace=1,
        expert_type="gelu",
        capacity_factor=None,
        drop_policy="probs",
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        norm_topk_prob=True,
        bos_token_id=1,
        eos_token_id=2,
    ),
}

YARN_UNEQUAL = dict(
    type="yarn",
    factor=8.0,
    original_max_position_embeddings=32,
    beta_fast=16,
    beta_slow=2,
    mscale=0.8,
    mscale_all_dim=0.5,
)
YARN_PLAIN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
MLA = dict(
    attention="mla",
    kv_lora_rank=16,
    q_lora_rank=24,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=14,
    num_attention_heads=3,
    num_key_value_heads=3,
    head_dim=20,
)


def _v(family, name, config=None, **how) -> Variant:
    return Variant(family, name, BASE[family] | (config or {}), **how)


NAMED = [
    _v("mixtral", "base"),
    _v("mixtral", "fused", spelling="fused", config_form="v5", shards=3, prompt_len=17),
    _v("mixtral", "three-experts", dict(num_local_experts=3, num_experts_per_tok=3, num_attention_heads=5, num_key_value_heads=5, head_dim=12), prompt_len=21),
    _v("mixtral", "top1-tied", dict(num_local_experts=3, num_experts_per_tok=1, tie_word_embeddings=True), config_form="v5"),
    _v("mixtral", "f32", dict(head_dim=None, num_attention_heads=6, num_key_value_heads=2, num_local_experts=3), stored="float32", shards=2, prompt_len=20),
    _v("mixtral", "f16", stored="float16"),
    _v("mixtral", "window", dict(sliding_window=8), prompt_len=29),
    _v("qwen3_moe", "base"),
    _v("qwen3_moe", "mixed", dict(num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[3], norm_topk_prob=False, tie_word_embeddings=True), shards=2, prompt_len=23),
    _v("qwen3_moe", "fused", dict(num_experts=3, num_experts_per_tok=1, num_attention_heads=3, num_key_value_heads=1), spelling="fused", config_form="v5"),
    _v("qwen3_moe", "all-experts", dict(num_experts=5, num_experts_per_tok=5, norm_topk_prob=False), stored="float32", prompt_len=40),
    _v("qwen3_moe", "yarn", dict(rope_scaling=YARN_PLAIN), prompt_len=31),
    _v("olmoe", "base"),
    _v("olmoe", "clip", dict(clip_qkv=1.2, num_key_value_heads=2, norm_topk_prob=True), shards=2, prompt_len=19),
    _v("olmoe", "fused", dict(hidden_size=36, num_experts=3, num_experts_per_tok=1, num_attention_heads=3, num_key_value_heads=1), spelling="fused", config_form="v5"),
    _v("olmoe", "f16", dict(num_experts_per_tok=8, tie_word_embeddings=True), stored="float16", prompt_len=40),
    _v("deepseek_v3", "base"),
    _v("deepseek_v3", "mtp", dict(num_nextn_predict_layers=1), mtp=True, shards=2),
    _v("deepseek_v3", "no-q-lora", dict(q_lora_rank=None, n_group=1, topk_group=1, n_shared_experts=2, rope_scaling=None, norm_topk_prob=False, routed_scaling_factor=1.0), spelling="fused", config_form="v5", prompt_len=19),
    _v("deepseek_v3", "two-groups", dict(n_group=2, topk_group=1, n_routed_experts=6, num_experts_per_tok=2, first_k_dense_replace=0, rope_scaling=YARN_UNEQUAL), config_form="v5", prompt_len=27),
    _v("deepseek_v3", "all-experts", dict(n_group=1, topk_group=1, n_routed_experts=3, num_experts_per_tok=3, num_attention_heads=4, num_key_value_heads=4), stored="float32"),
    _v("deepseek_v3", "top1", dict(num_experts_per_tok=1, tie_word_embeddings=True), stored="float16"),
    _v(
        "deepseek_v3",
        "fp8",
        dict(hidden_size=136, moe_intermediate_size=24, intermediate_size=140, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, q_lora_rank=40, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=24),
        stored="fp8",
    ),
    _v("paper", "base"),
    _v("paper", "mla", MLA | dict(expert_type="swiglu", num_experts=3, num_experts_per_tok=1), prompt_len=19),
    _v("paper", "mla-no-q-lora", MLA | dict(q_lora_rank=None), prompt_len=33),
    _v("paper", "gqa-swiglu", dict(expert_type="swiglu", num_attention_heads=3, num_key_value_heads=1, head_dim=20, tie_word_embeddings=True, num_experts_per_tok=4, norm_topk_prob=False), shards=2),
    _v("paper", "capacity-probs", dict(capacity_factor=1.0), prompt_len=17),
    _v("paper", "capacity-position", dict(capacity_factor=0.75, drop_policy="position", expert_type="swiglu"), prompt_len=18),
]

# What is kept in the repository: small, and together it covers every key. Of seeds 0 to 15 the one for which
# PyTorch's own BF16 run is near its F32 run, routers are off the fence, and the 17 tokens are not a loop.
COMMITTED = {
    "mixtral": 4,
    "mixtral-fused": 6,
    "mixtral-top1-tied": 2,
    "mixtral-f32": 2,
    "qwen3_moe": 1,
    "qwen3_moe-mixed": 15,
    "qwen3_moe-fused": 10,
    "olmoe": 2,
    "olmoe-clip": 6,
    "deepseek_v3": 5,
    "deepseek_v3-mtp": 8,
    "deepseek_v3-no-q-lora": 3,
    "deepseek_v3-two-groups": 4,
    "deepseek_v3-fp8": 0,
    "deepseek_v3-top1": 0,
    "paper": 12,
    "paper-mla": 6,
    "paper-gqa-swiglu": 5,
    "paper-capacity-probs": 5,
    "paper-capacity-position": 8,
}


def random_variant(family: str, seed: int) -> Variant:
    """A valid model of `family` that only `seed` decides. Sizes stay tiny, relations between them do not."""
    r = random.Random(f"{family}/{seed}")
    kv_heads = r.choice([1, 1, 2, 3])
    heads = kv_heads * r.choice([1, 2, 3, 5])
    head_dim = 2 * r.randint(4, 16)
    experts = r.choice([2, 3, 4, 5, 7, 8, 16])
    top_k = r.randint(1, min(experts, 6))
    c = dict(
        hidden_size=8 * r.randint(4, 14),
        vocab_size=r.randint(90, 300),
        num_hidden_layers=r.randint(1, 4),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_experts_per_tok=top_k,
        tie_word_embeddings=r.random() < 0.3,
        rope_theta=r.choice([1e4, 5e5, 1e6]),
        rms_norm_eps=r.choice([1e-5, 1e-6]),
    )
    ffn, moe_ffn = 4 * r.randint(4, 24), 4 * r.randint(3, 16)
    yarn = dict(
        type="yarn",
        factor=r.choice([2.0, 4.0, 40.0]),
        original_max_position_embeddings=r.choice([16, 32, 128]),
        beta_fast=r.choice([32, 16]),
        beta_slow=r.choice([1, 2]),
        mscale=r.choice([1.0, 0.707]),
        mscale_all_dim=r.choice([1.0, 0.5]),
    )
    yarn = yarn if r.random() < 0.5 else None
    stored = r.choice(["bfloat16", "bfloat16", "bfloat16", "float32", "float16"])
    mla = dict(
        q_lora_rank=r.choice([None, 4 * r.randint(3, 12)]),
        kv_lora_rank=4 * r.randint(3, 12),
        qk_nope_head_dim=r.randint(5, 20),
        qk_rope_head_dim=2 * r.randint(2, 8),
        v_head_dim=r.randint(5, 20),
        num_key_value_heads=heads,
    )
    if family == "mixtral":
        c |= dict(head_dim=head_dim, intermediate_size=ffn, num_local_experts=experts)
    elif family == "qwen3_moe":
        layers = c["num_hidden_layers"]
        c |= dict(
            head_dim=head_dim,
            intermediate_size=ffn,
            moe_intermediate_size=moe_ffn,
            num_experts=experts,
            norm_topk_prob=r.random() < 0.5,
            decoder_sparse_step=r.choice([1, 1, 2]),
            mlp_only_layers=sorted(r.sample(range(layers), r.randint(0, layers - 1))),
        )
    elif family == "olmoe":
        c |= dict(
            hidden_size=heads * head_dim,
            intermediate_size=ffn,
            num_experts=experts,
            norm_topk_prob=r.random() < 0.5,
            clip_qkv=r.choice([None, 1.0, 2.0]),
        )
    elif family == "deepseek_v3":
        groups = r.choice([1, 2, 4])
        experts = groups * r.choice([2, 3, 4])
        topk_group = r.randint(1, groups)
        c |= mla | dict(
            intermediate_size=ffn,
            moe_intermediate_size=moe_ffn,
            n_routed_experts=experts,
            n_group=groups,
            topk_group=topk_group,
            num_experts_per_tok=r.randint(1, min(6, experts // groups * topk_group)),
            n_shared_experts=r.choice([1, 2]),
            norm_topk_prob=r.random() < 0.7,
            routed_scaling_factor=r.choice([1.0, 2.5]),
            first_k_dense_replace=r.randint(0, c["num_hidden_layers"] - 1),
            rope_scaling=yarn,
        )
        if r.random() < 0.3:
            stored = "fp8"
            c |= dict(hidden_size=8 * r.randint(10, 40), moe_intermediate_size=4 * r.randint(20, 60))
    elif family == "paper":
        c |= dict(
            head_dim=head_dim,
            intermediate_size=ffn,
            moe_intermediate_size=moe_ffn,
            num_experts=experts,
            first_k_dense_replace=r.randint(0, c["num_hidden_layers"] - 1),
            expert_type=r.choice(["gelu", "swiglu"]),
            norm_topk_prob=r.random() < 0.7,
            capacity_factor=r.choice([None, None, 0.5, 1.0, 1.25]),
            drop_policy=r.choice(["probs", "position"]),
        )
        if r.random() < 0.5:
            c |= mla | dict(attention="mla", head_dim=mla["qk_nope_head_dim"] + mla["qk_rope_head_dim"])
    fusable = family != "paper" and stored != "fp8"
    return Variant(
        family,
        f"random{seed}",
        BASE[family] | c,
        stored=stored,
        spelling=r.choice(["per_expert", "fused"]) if fusable else "per_expert",
        config_form=r.choice(["v4", "v5"]) if family != "paper" and stored != "fp8" else "v4",
        shards=r.choice([1, 1, 2, 3]),
        prompt_len=r.randint(13, 40),
        seed=seed,
    )
