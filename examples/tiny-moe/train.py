"""Trains the small MoE of this folder and writes it in the Hugging Face format (`qwen3_moe`).

    python train.py train --data work --out run        # after prepare.py; one GPU
    python train.py sample --model run                 # continuations through transformers, CPU

`train` needs PyTorch, numpy and safetensors; `sample` needs transformers.

The weights beside this file were made on one H100 with the defaults, the best of eight settings tried:
3,000 steps, 57 s after the first one's compilation, held-out loss over the novels 3.717 in windows of 512
and 3.683 in windows of 2048. A run ends early at `--max-minutes`, SIGINT or SIGTERM, and writes the best
checkpoint it has; the config's context is the longest window which that checkpoint was trained on.

The model is what `MODEL` says. Experts are computed densely (every expert for every token, weighted
by the router, zero for all but the top two): at this size three large matrix products beat
dispatching. Sources repeat many times in a run, so there is dropout, and the checkpoint kept is the
one of lowest loss on the held-out chapters of the novels.
"""

import argparse
import json
import math
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

MODEL = dict(
    vocab_size=4096,
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=16,
    num_experts=16,
    num_experts_per_tok=2,
    moe_intermediate_size=96,
    rope_theta=10000.0,
    rms_norm_eps=1e-6,
)
NOVELS = ("austen", "melville", "doyle", "twain")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PROMPTS = ("It was a fine morning, and the", "She had always been")


# ---- the model ------------------------------------------------------------------------------------


def linear(inputs, outputs, scale=0.5):
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=scale / math.sqrt(inputs))
    return layer


class RMSNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + MODEL["rms_norm_eps"])
        return (x32 * scale * self.weight).to(x.dtype)


def rotary(length, device):
    """cos and sin, [length, head_dim / 2]."""
    half = MODEL["head_dim"] // 2
    inverse = MODEL["rope_theta"] ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * inverse
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """RoPE on [batch, heads, length, head_dim]; the two halves of a head are the pairs."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        hidden, self.head_dim = MODEL["hidden_size"], MODEL["head_dim"]
        heads = MODEL["num_attention_heads"] * self.head_dim
        self.q_proj, self.k_proj, self.v_proj = (linear(hidden, heads) for _ in range(3))
        self.o_proj = linear(heads, hidden, 0.5 / math.sqrt(2 * MODEL["num_hidden_layers"]))
        self.q_norm, self.k_norm = RMSNorm(self.head_dim), RMSNorm(self.head_dim)

    def forward(self, x, cos, sin):
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q = rotate(self.q_norm(q).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(k).transpose(1, 2), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(-2))


class Experts(nn.Module):
    """All experts side by side: `gate`, `up` [experts * inner, hidden], `down` [hidden, experts * inner]."""

    def __init__(self):
        super().__init__()
        hidden, experts, inner = MODEL["hidden_size"], MODEL["num_experts"], MODEL["moe_intermediate_size"]
        self.router = linear(hidden, experts)
        self.gate, self.up = linear(hidden, experts * inner), linear(hidden, experts * inner)
        self.down = linear(experts * inner, hidden)
        scale = 0.5 / math.sqrt(inner) / math.sqrt(2 * MODEL["num_hidden_layers"])
        nn.init.normal_(self.down.weight, std=scale)

    def forward(self, x):
        """The output, the load-balancing loss (1 when even) and each expert's share of the choices."""
        probs = F.linear(x.float(), self.router.weight.float()).softmax(-1)
        top, chosen = probs.topk(MODEL["num_experts_per_tok"], -1)
        top = top / top.sum(-1, keepdim=True)
        weights = torch.zeros_like(probs).scatter(-1, chosen, top)
        share = (weights.detach() > 0).float().mean((0, 1)) / MODEL["num_experts_per_tok"]
        balance = MODEL["num_experts"] * (share * probs.mean((0, 1))).sum()
        inner = F.silu(self.gate(x)) * self.up(x)
        inner = inner.unflatten(-1, (MODEL["num_experts"], -1)) * weights.to(inner.dtype)[..., None]
        return self.down(inner.flatten(-2)), balance, share


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm = RMSNorm(MODEL["hidden_size"])
        self.self_attn = Attention()
        self.post_attention_layernorm = RMSNorm(MODEL["hidden_size"])
        self.mlp = Experts()

    def forward(self, x, cos, sin, drop):
        x = x + F.dropout(self.self_attn(self.input_layernorm(x), cos, sin), drop, self.training)
        y, balance, share = self.mlp(self.post_attention_layernorm(x))
        return x + F.dropout(y, drop, self.training), balance, share


class Model(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.dropout = dropout
        self.embed_tokens = nn.Embedding(MODEL["vocab_size"], MODEL["hidden_size"])
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.layers = nn.ModuleList(Layer() for _ in range(MODEL["num_hidden_layers"]))
        self.norm = RMSNorm(MODEL["hidden_size"])

    def forward(self, ids, targets):
        """Loss of each position [batch, length], the balance loss, shares [layers, experts]."""
        cos, sin = rotary(ids.shape[1], ids.device)
        x = F.dropout(self.embed_tokens(ids), self.dropout, self.training)
        balances, shares = [], []
        for layer in self.layers:
            x, balance, share = layer(x, cos, sin, self.dropout)
            balances.append(balance)
            shares.append(share)
        logits = F.linear(self.norm(x), self.embed_tokens.weight)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        return loss.view_as(targets), torch.stack(balances).mean(), torch.stack(shares)


# ---- data -----------------------------------------------------------------------------------------


class Windows:
    """Random windows that begin at a paragraph or a document, from several sources by weight."""

    def __init__(self, arrays, weights, newline, end, device):
        self.sources, sizes = [], []
        for name, weight in weights.items():
            ids = arrays[f"train_{name}"].astype(np.int64)
            after_end = np.flatnonzero(ids == end) + 1
            after_blank = np.flatnonzero((ids[1:] == newline) & (ids[:-1] == newline)) + 2
            starts = np.unique(np.concatenate(([0], after_end, after_blank)))
            self.sources.append((torch.from_numpy(ids).to(device), torch.from_numpy(starts).to(device)))
            sizes.append(weight * len(ids))
        self.tokens = sum(sizes)  # weighted: the tokens of one epoch
        self.shares = torch.tensor(sizes) / self.tokens

    def batch(self, count, length):
        rows = []
        counts = torch.multinomial(self.shares, count, True).bincount(minlength=len(self.sources))
        for (ids, starts), n in zip(self.sources, counts):
            at = starts[torch.randint(len(starts), (int(n),), device=ids.device)]
            at = at.clamp(max=len(ids) - length - 1)
            rows.append(ids[at[:, None] + torch.arange(length + 1, device=ids.device)])
        return torch.cat(rows)


@torch.no_grad()
def evaluate(model, arrays, length, device):
    """Mean loss a token of each held-out source, of the novels together, and expert shares."""
    model.eval()
    losses, counts, shares = {}, {}, []
    for key in (k for k in arrays if k.startswith("val_")):
        ids = torch.from_numpy(arrays[key].astype(np.int64)).to(device)
        total = 0.0
        rows = (len(ids) - 1) // length
        windows = ids[: rows * length].view(rows, length), ids[1 : rows * length + 1].view(rows, length)
        for x, y in zip(windows[0].split(16), windows[1].split(16)):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss, _, share = model(x, y)
            total += loss.sum().item()
            shares.append(share)
        losses[key[4:]], counts[key[4:]] = total / max(rows * length, 1), rows * length
    novels = sum(losses[n] * counts[n] for n in NOVELS) / sum(counts[n] for n in NOVELS)
    model.train()
    return novels, losses, torch.stack(shares).mean(0)


# ---- training -------------------------------------------------------------------------------------


def train(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    arrays = dict(np.load(args.data / "tokens.npz"))
    tokenizer = json.loads((args.data / "tokenizer.json").read_text())
    newline, end = tokenizer["model"]["vocab"]["\u010a"], tokenizer["model"]["vocab"]["<|endoftext|>"]
    weights = {n: 1.0 for n in NOVELS} | {"web": args.web, "chat": args.chat}
    windows = Windows(arrays, {n: w for n, w in weights.items() if w > 0}, newline, end, device)

    model = Model(args.dropout).to(device)
    count = sum(p.numel() for p in model.parameters())
    print(
        f"{count:,} parameters; {args.steps} steps of {args.batch} tokens, "
        f"{args.steps * args.batch / windows.tokens:.1f} epochs of {windows.tokens:,.0f} weighted tokens"
    )
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [dict(params=matrices, weight_decay=args.decay), dict(params=vectors, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    forward = torch.compile(model, dynamic=False) if args.compile else model

    warmup = min(200, args.steps // 10 + 1)
    began, best, best_state, trained = time.time(), math.inf, None, args.length
    stop = []  # a run that is told to end keeps what it has
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.append(True))
    for step in range(args.steps):
        # Whichever of the two is further on, steps or minutes, sets the learning rate, so that a run
        # that is short of time still anneals.
        done = max(step / args.steps, (time.time() - began) / (60 * args.max_minutes))
        if done >= 1 or stop:
            print(f"ended after {step} steps, {time.time() - began:.0f} s", flush=True)
            break
        lr = args.lr * min(1, (step + 1) / warmup) * max(0.5 * (1 + math.cos(math.pi * done)), 0.01)
        for group in optimizer.param_groups:
            group["lr"] = lr
        length = args.length if done < 0.8 else args.long  # the last fifth at the full context
        ids = windows.batch(max(args.batch // length, 1), length)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, balance, _ = forward(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        loss = loss.mean()
        (loss + args.balance * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step == 0:
            began = time.time()  # compilation does not count
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            novels, losses, shares = evaluate(model, arrays, 512, device)
            each = " ".join(f"{n} {v:.3f}" for n, v in losses.items())
            print(
                f"step {step + 1:5} {time.time() - began:5.0f} s  lr {lr:.1e}  train {loss.item():.3f}  balance "
                f"{balance.item():.3f}  held-out novels {novels:.4f} ({each})  "
                f"expert shares {shares.min():.3f} to {shares.max():.3f}",
                flush=True,
            )
            if novels < best:
                best, best_state = novels, {k: v.detach().clone() for k, v in model.state_dict().items()}
                trained = length
                export(best_state, trained, args.data / "tokenizer.json", args.out)
    print(f"trained {time.time() - began:.0f} s after the first step")
    if best_state is None:
        best_state = model.state_dict()
    # The file holds BF16: what is measured last is what is written.
    model.load_state_dict({k: v.bfloat16().float() for k, v in best_state.items()})
    for length in (512, args.long):
        novels, losses, shares = evaluate(model, arrays, length, device)
        each = " ".join(f"{n} {v:.3f}" for n, v in losses.items())
        print(f"kept, in BF16, windows of {length}: held-out novels {novels:.4f} ({each})")
    for layer, share in enumerate(shares):
        print(f"layer {layer} expert shares " + " ".join(f"{s:.3f}" for s in share))
    export(best_state, trained, args.data / "tokenizer.json", args.out)
    print(f"wrote {args.out}: {count:,} parameters, context {trained}")


# ---- the folder -----------------------------------------------------------------------------------


def export(state, context, tokenizer, out):
    """Writes the model folder: one tensor an expert, as transformers 4 spells them, in BF16.

    `state` is a state_dict of `Model`; `context`, in tokens, the longest window it was trained on.
    """
    from safetensors.torch import save_file

    experts, tensors = MODEL["num_experts"], {}
    for name, value in state.items():
        value = value.bfloat16().cpu()
        where, _, leaf = name.partition(".mlp.")
        if leaf == "router.weight":
            tensors[f"model.{where}.mlp.gate.weight"] = value
        elif leaf:
            projection = leaf.split(".")[0]
            for e, part in enumerate(value.chunk(experts, 1 if projection == "down" else 0)):
                tensors[f"model.{where}.mlp.experts.{e}.{projection}_proj.weight"] = part.contiguous()
        else:
            tensors[f"model.{name}"] = value
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(out / "model.safetensors"), metadata={"format": "pt"})
    shutil.copy(tokenizer, out / "tokenizer.json")
    config = dict(
        architectures=["Qwen3MoeForCausalLM"],
        model_type="qwen3_moe",
        **MODEL | dict(max_position_embeddings=context),
        intermediate_size=MODEL["moe_intermediate_size"] * MODEL["num_experts_per_tok"],
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        output_router_logits=False,
        hidden_act="silu",
        attention_bias=False,
        attention_dropout=0.0,
        rope_scaling=None,
        use_sliding_window=False,
        sliding_window=None,
        max_window_layers=MODEL["num_hidden_layers"],
        initializer_range=0.02,
        tie_word_embeddings=True,
        use_cache=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        torch_dtype="bfloat16",
        transformers_version="4.57.0",
    )
    generation = dict(
        eos_token_id=[0, 2], pad_token_id=0, do_sample=True, temperature=0.7, top_p=0.9, repetition_penalty=1.1
    )
    flags = dict(lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer_config = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        added_tokens_decoder={str(i): dict(content=n, **flags) for i, n in enumerate(names)},
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        bos_token=None,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        clean_up_tokenization_spaces=False,
        model_max_length=context,
        chat_template=CHAT_TEMPLATE,
    )
    for name, value in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer_config),
    ):
        (out / name).write_text(json.dumps(value, indent=2) + "\n")


def sample(args):
    """Continuations through transformers, greedy and sampled."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, output_loading_info=True
    )
    print({k: v for k, v in info.items() if v})
    chat = tokenizer.apply_chat_template(
        [dict(role="user", content="How do you like the country?")], tokenize=False, add_generation_prompt=True
    )
    for prompt in (*PROMPTS, "The old man took his hat and", "My dear friend, I", "The river", chat):
        ids = tokenizer(prompt, return_tensors="pt")
        for options in (dict(do_sample=False, repetition_penalty=1.0), dict(do_sample=True, temperature=0.7)):
            torch.manual_seed(args.seed)
            out = model.generate(**ids, max_new_tokens=args.tokens, **options)
            kind = "sampled, temperature 0.7" if options["do_sample"] else "greedy"
            print(f"\n[{kind}] {tokenizer.decode(out[0])}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    t = commands.add_parser("train")
    t.set_defaults(run=train)
    t.add_argument("--data", type=Path, required=True, help="what prepare.py wrote")
    t.add_argument("--out", type=Path, required=True)
    t.add_argument("--steps", type=int, default=3000)
    t.add_argument("--batch", type=int, default=32768, help="tokens a step")
    t.add_argument("--length", type=int, default=512, help="window of the first four fifths")
    t.add_argument("--long", type=int, default=2048, help="window of the last fifth")
    t.add_argument("--lr", type=float, default=3e-3)
    t.add_argument("--decay", type=float, default=1.0, help="weight decay of the matrices")
    t.add_argument("--dropout", type=float, default=0.2)
    t.add_argument("--balance", type=float, default=0.01, help="weight of the load-balancing loss")
    t.add_argument("--web", type=float, default=0.3, help="weight of the Bible beside the novels")
    t.add_argument("--chat", type=float, default=0.3, help="weight of the exchanges")
    t.add_argument("--every", type=int, default=250, help="steps between evaluations")
    t.add_argument("--max-minutes", type=float, default=5)
    t.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    t.add_argument("--seed", type=int, default=1)
    s = commands.add_parser("sample")
    s.set_defaults(run=sample)
    s.add_argument("--model", type=Path, required=True)
    s.add_argument("--tokens", type=int, default=60)
    s.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
