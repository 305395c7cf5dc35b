#!/usr/bin/env python3
"""Makes the tiny models, adapters and reference values of dev/ref (its README.md lists the tensors), and the table
tiny_bf16.json there.

    dump_reference.py [--out DIR] [NAME...]     write (default: dev/ref, every configuration and the table)
    dump_reference.py --check [NAME...]         make them again in a temporary folder and compare with dev/ref
"""

import argparse
import os
import shutil
import tempfile

import peers
from peers import np, torch

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
REF, TINY = os.path.join(ROOT, "dev", "ref"), os.path.join(ROOT, "dev", "tiny_llama")
TABLE_FILE, TABLE_START = "tiny_bf16.json", "tiny_adapter"
STEPS = 20


def llama(hidden, ffn, heads, kv, vocab, tie, dtype, **more):
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
              "intermediate_size": ffn, "num_hidden_layers": 2, "num_attention_heads": heads, "vocab_size": vocab,
              "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": tie,
              "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": dtype}
    if kv is not None:
        config["num_key_value_heads"] = kv
    config.update(more)
    return config


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}

# documents: (length, leading rows without a target). The last row of a document never has one.
CONFIGURATIONS = {
    "gqa_llama3": dict(
        model=llama(64, 112, 4, 2, 96, False, "bfloat16", rope_theta=500000.0, rope_scaling=LLAMA3),
        dtype="bf16", lora=dict(rank=4, alpha=8, targets=peers.ALL_LINEARS), documents=[(16, 6), (4, 0), (13, 6)]),
    "tied": dict(
        model=llama(48, 80, 6, 2, 96, True, "float32", rope_theta=100000, rope_scaling=None),
        dtype="f32", lora=dict(rank=4, alpha=6, targets=peers.ALL_LINEARS), documents=[(9, 0), (18, 9), (6, 2)]),
    "head_dim": dict(
        model=llama(64, 96, 4, 2, 96, False, "bfloat16", head_dim=24,
                    rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
        dtype="bf16", lora=dict(rank=4, alpha=4, targets=peers.ALL_LINEARS),
        documents=[(11, 3), (1, 0), (8, 7), (13, 0)]),
    "odd_width": dict(
        model=llama(48, 112, 3, 1, 101, False, "bfloat16", rope_theta=500000.0, rms_norm_eps=1e-6),
        dtype="bf16", lora=dict(rank=3, alpha=5, targets=peers.ALL_LINEARS), documents=[(17, 4), (11, 0), (5, 5)]),
    "bnb_nf4": dict(
        model=llama(64, 320, 2, 1, 96, False, "bfloat16", rope_theta=500000.0),
        dtype="nf4", lora=dict(rank=2, alpha=2, targets=peers.ALL_LINEARS), documents=[(11, 4), (4, 0), (9, 3)]),
    "qv_only": dict(
        model=llama(64, 96, 4, 4, 96, True, "bfloat16", rope_theta=10000.0),
        dtype="bf16", lora=dict(rank=4, alpha=8, targets=["q_proj", "v_proj"]), documents=[(7, 2), (16, 0), (10, 5)]),
    "linear_rslora": dict(
        model=llama(48, 80, 4, None, 96, False, "float16", rope_theta=10000.0,
                    rope_scaling={"type": "linear", "factor": 4.0}),
        dtype="f16", lora=dict(rank=8, alpha=2, targets=peers.ALL_LINEARS, rslora=True),
        documents=[(12, 1), (11, 7), (6, 0)]),
}

# How fp32 is run. The dumped values are those of the first; the yardstick is the largest error of all of them, since
# one run's rounding errors are a single draw.
VARIANTS = [dict(attention="eager", reverse=False, onednn=True), dict(attention="eager", reverse=True, onednn=False),
            dict(attention="sdpa", reverse=False, onednn=False), dict(attention="sdpa", reverse=True, onednn=True)]

# How far a yardstick may move when it is made again on another processor, where sums in another order flip roundings:
# root mean squares little, but for the norms of late steps; the largest error and single numbers (loss) are draws (AVX2
# for AVX-512: up to 2.04 in odd_width). Below the floor, a quarter unit of bf16, luck alone decides.
DRIFT16, FLOOR16 = {"rms16": 3.0, "err16": 4.0}, 2.0 ** -10


def make_documents(spec, vocab, seed):
    rng = np.random.default_rng(seed)
    documents = []
    for length, masked in spec:
        tokens = rng.integers(0, vocab, length).tolist()
        targets = [tokens[i + 1] if masked <= i < length - 1 else -1 for i in range(length)]
        documents.append((tokens, targets))
    return documents


def seed_of(name):
    return 1000 + 10 * list(CONFIGURATIONS).index(name)


class Recorder:
    """Activations by name, from hooks on the modules and from transformers' own RoPE function."""

    def __init__(self, model):
        self.values = {}
        self.layer = 0
        self.handles = []
        llama_model = model.get_base_model().model
        self.take(llama_model.embed_tokens, "embed")
        for l, layer in enumerate(llama_model.layers):
            p = f"layers.{l}."
            self.handles.append(layer.register_forward_pre_hook(lambda m, a, l=l: self.enter(l)))
            self.take(layer, p + "resid_in", of_input=True)
            self.take(layer.input_layernorm, p + "norm1")
            self.take(layer.self_attn.v_proj, p + "v")
            self.take(layer.self_attn.o_proj, p + "attn", of_input=True)
            self.take(layer.post_attention_layernorm, p + "resid_mid", of_input=True)
            self.take(layer.post_attention_layernorm, p + "norm2")
            self.take(layer.mlp.gate_proj, p + "gate")
            self.take(layer.mlp.up_proj, p + "up")
            self.take(layer.mlp.down_proj, p + "swiglu", of_input=True)
            self.take(layer, p + "resid_out")
        self.take(llama_model.norm, "final_norm")
        self.rope = peers.modeling_llama.apply_rotary_pos_emb
        peers.modeling_llama.apply_rotary_pos_emb = self.rotate

    def enter(self, layer):
        self.layer = layer

    def rotate(self, *args, **kwargs):
        q, k = self.rope(*args, **kwargs)
        for name, x in (("q", q), ("k", k)):
            self.store(f"layers.{self.layer}.{name}", x.transpose(1, 2).flatten(2))
        return q, k

    def take(self, module, name, of_input=False):
        if of_input:
            hook = module.register_forward_pre_hook(
                lambda m, args, kwargs: self.store(name, args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True)
        else:
            hook = module.register_forward_hook(lambda m, args, out: self.store(name, out))
        self.handles.append(hook)

    def store(self, name, x):
        self.values.setdefault(name, []).append(x.detach()[0].clone())

    def close(self):
        peers.modeling_llama.apply_rotary_pos_emb = self.rope
        for h in self.handles:
            h.remove()


def mixed_precision(model):
    """`model` in the bf16 that PEFT users train in: the frozen base cast to bf16, adapters in fp32, and a forward pass
    under autocast, as accelerate wraps it. Autocast rounds A and B to bf16 for the products, so x A^T and all
    activations are bf16; a gradient of A or B is one bf16 product a document, widened and added up in fp32."""
    for name, p in model.named_parameters():
        if ".lora_" not in name:
            p.data = p.data.to(torch.bfloat16)
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
    return model


def run(path, documents, dtype, attention, reverse, onednn):
    """Forward, gradients and STEPS AdamW steps; returns {name: tensor}. dtype bf16: mixed precision."""
    values = {}
    mixed = dtype is torch.bfloat16
    parameters = torch.float32 if mixed else dtype
    order = list(reversed(range(len(documents)))) if reverse else list(range(len(documents)))
    ordered = [documents[i] for i in order]
    base, quantised = peers.load_base(path, parameters, attention)
    model = peers.load_adapter(base, os.path.join(path, "adapter"), parameters, train=True)
    model = mixed_precision(model) if mixed else model
    torch.backends.mkldnn.enabled = onednn
    with peers.precision(dtype):
        count = sum(t >= 0 for _, targets in documents for t in targets)
        recorder = Recorder(model)
        with torch.no_grad():
            for tokens, targets in documents:
                _, logits = peers.document_loss(model, tokens, targets, count)
                recorder.store("logits", logits[None])
        recorder.close()
        values.update({k: torch.cat(v) for k, v in recorder.values.items()})
        if any(v.dtype is not dtype for v in values.values()):
            raise RuntimeError("an activation was computed in another precision")
        optimizer = peers.make_optimizer(model, lr=1e-2, eps=1e-6, weight_decay=0.01)
        losses, norms = [], []
        for step in range(STEPS):
            losses.append(peers.backward(model, ordered))
            if step == 0:
                values["loss"] = torch.tensor([losses[0]], dtype=parameters)
                values.update({"grad." + k: p.grad.clone() for k, p in peers.trainable(model).items()})
            norms.append(peers.clip_and_update(model, optimizer, clip=1.0))
        values["losses"] = torch.tensor(losses, dtype=torch.float64)
        values["grad_norms"] = torch.tensor(norms, dtype=torch.float64)
        values.update({"final." + k: p.detach().clone() for k, p in peers.trainable(model).items()})
    if any(v.dtype not in (dtype, parameters, torch.float64) for v in values.values()):
        raise RuntimeError("a value was computed in another precision")
    return values, quantised


def error(x, truth):
    rms = truth.double().pow(2).mean().sqrt()
    return ((x.double() - truth).abs().max() / rms).item()


YARDSTICKS = {"err": error, "err16": error, "rms16": peers.relative_rms}


def make_model(name, path):
    """Model and adapter of a configuration."""
    spec = CONFIGURATIONS[name]
    seed = seed_of(name)
    shutil.rmtree(path, ignore_errors=True)
    if spec["dtype"] == "nf4":
        with tempfile.TemporaryDirectory() as temporary:
            peers.write_model(temporary, dict(spec["model"], dtype="bfloat16"), torch.bfloat16, seed)
            peers.write_nf4_model(path, temporary)
        os.remove(os.path.join(path, "generation_config.json"))
    else:
        peers.write_model(path, spec["model"], peers.DTYPES[spec["dtype"]], seed)
    peers.write_adapter(os.path.join(path, "adapter"), path, seed + 1, b_scale=0.3, **spec["lora"])


def make_dump(name, path):
    """dump.safetensors of the model and adapter in `path`; returns its tensors."""
    spec = CONFIGURATIONS[name]
    documents = make_documents(spec["documents"], spec["model"]["vocab_size"], seed_of(name) + 2)
    truth, _ = run(path, documents, torch.float64, "eager", False, True)
    runs = [run(path, documents, torch.float32, **v) for v in VARIANTS]
    runs16 = [run(path, documents, torch.bfloat16, **v) for v in VARIANTS]
    values, quantised = runs[0]
    tensors = {}
    for key, value in values.items():
        tensors[key] = value.contiguous()
        for prefix, measure in YARDSTICKS.items():
            of = runs if prefix == "err" else runs16
            tensors[f"{prefix}.{key}"] = torch.tensor([max(measure(r[key], truth[key]) for r, _ in of)],
                                                      dtype=torch.float64)
    for key in ("model.layers.0.self_attn.k_proj.weight", "model.layers.0.mlp.gate_proj.weight"):
        if key in quantised:
            tensors["dequantised." + key] = quantised[key]
    bounds = np.cumsum([0] + [len(t) for t, _ in documents])
    tensors["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
    tensors["tokens"] = torch.tensor([t for d, _ in documents for t in d], dtype=torch.int32)
    tensors["targets"] = torch.tensor([t for _, d in documents for t in d], dtype=torch.int32)
    peers.save_file(tensors, os.path.join(path, "dump.safetensors"), metadata={"format": "pt"})
    for folder, _, files in os.walk(path):
        for file in files:
            os.chmod(os.path.join(folder, file), 0o644)
    return tensors


def describe(name, tensors):
    norms = tensors["grad_norms"]
    print(f"{name}: {len(tensors['tokens'])} tokens, loss {tensors['losses'][0]:.4f} -> {tensors['losses'][-1]:.4f}, "
          f"norm {norms.min():.3f}..{norms.max():.3f}", flush=True)
    for prefix in YARDSTICKS:
        groups = {"activations": [], "grad": [], "final": [], "loss": [], "losses": [], "grad_norms": []}
        for key in tensors:
            if key.startswith(prefix + "."):
                group = key.split(".")[1]
                groups[group if group in groups else "activations"].append(tensors[key].item())
        print(f"  largest {prefix}: " + ", ".join(f"{g} {max(v):.1e}" for g, v in groups.items()), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# the table: losses of dev/tiny_llama in fp32 and in bf16

# The trainer's options of the same run, from the repository root: --lr is constant, so a shorter run has the same first
# steps.
TABLE = dict(batch=4, max_tokens=48, steps=20, lr=1e-3, eps=1e-6, clip=1.0)
TABLE_LORA = dict(rank=4, alpha=32, targets=peers.ALL_LINEARS, b_scale=0.0)
TABLE_OPTIONS = ("-i data.jsonl --init-adapter dev/ref/tiny_adapter -b 4 -t 48 -n 20 --lr 1e-3 --schedule constant "
                 "--warmup 0 --eps 1e-6 --clip 1 --no-shuffle --val none --quant %s")
TABLE_QUANTS = ("none", "nf4")
TABLE_SEEDS = (61, 62, 63)  # of the adapters that training starts from; the first is dev/ref/tiny_adapter


def question_documents(path, tokenizer, max_tokens):
    """A file of {"question", "answer"} in plain form: BOS, `Question: Q\\nAnswer:`, ` A`, EOS; answer and EOS count."""
    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids
    documents = []
    with open(path, encoding="utf-8") as f:
        for record in map(peers.json.loads, f):
            prompt = encode("<|begin_of_text|>") + encode(f"Question: {record['question']}\nAnswer:")
            tokens = (prompt + encode(" " + record["answer"]) + encode("<|end_of_text|>"))[:max_tokens]
            targets = [tokens[i + 1] if len(prompt) <= i + 1 < len(tokens) else -1 for i in range(len(tokens))]
            documents.append((tokens, targets))
    return documents


def table_losses(quant, adapter, documents, dtype, attention):
    """Loss of each step."""
    base, _ = peers.load_base(TINY, torch.float32, attention, quant)
    model = peers.load_adapter(base, adapter, torch.float32, train=True)
    model = mixed_precision(model) if dtype is torch.bfloat16 else model
    optimizer = peers.make_optimizer(model, TABLE["lr"], TABLE["eps"], 0.0)
    losses = []
    for step in range(TABLE["steps"]):
        losses.append(peers.backward(model, documents[step * TABLE["batch"]:(step + 1) * TABLE["batch"]]))
        peers.clip_and_update(model, optimizer, TABLE["clip"])
    return losses


def make_table(out):
    """tiny_adapter and the table in `out`. The distances are the largest of three starts and two kinds of attention:
    one run's may be near zero by luck. The losses are those of tiny_adapter, eager attention."""
    tokenizer = peers.tokenizers.Tokenizer.from_file(os.path.join(TINY, "tokenizer.json"))
    documents = question_documents(os.path.join(ROOT, "data.jsonl"), tokenizer, TABLE["max_tokens"])
    table = {}
    with tempfile.TemporaryDirectory() as temporary:
        starts = [os.path.join(out, TABLE_START)] + [os.path.join(temporary, str(s)) for s in TABLE_SEEDS[1:]]
        for seed, start in zip(TABLE_SEEDS, starts, strict=True):
            peers.write_adapter(start, TINY, seed, **TABLE_LORA)
        for quant in TABLE_QUANTS:
            fp32 = [table_losses(quant, s, documents, torch.float32, "eager") for s in starts]
            bf16 = {attention: [table_losses(quant, s, documents, torch.bfloat16, attention) for s in starts]
                    for attention in ("eager", "sdpa")}
            distance = np.abs(np.array(list(bf16.values())) - np.array(fp32)).max(axis=(0, 1)).tolist()
            table[quant] = {"options": TABLE_OPTIONS % quant, "fp32": fp32[0], "bf16": bf16["eager"][0],
                            "distance": distance}
            print(f"{TABLE_FILE} {quant}: loss {fp32[0][0]:.4f} -> {fp32[0][-1]:.4f}, bf16 from fp32 "
                  + " ".join(f"{d:.4f}" for d in distance), flush=True)
    for file in os.listdir(starts[0]):
        os.chmod(os.path.join(starts[0], file), 0o644)
    peers.write_json(os.path.join(out, TABLE_FILE), table)


# ---------------------------------------------------------------------------------------------------------------------
# comparing

def compare_json(tally, name, old, new):
    with open(old, encoding="utf-8") as f, open(new, encoding="utf-8") as g:
        tally.check(name, peers.json.load(f) == peers.json.load(g))


def compare_models(tally, name, old, new):
    """Weights and adapters: equal bits. Only what bitsandbytes computes by a mean (the NF4 offset, and through it the
    second level) may differ by the processor; there the restored weights are compared, to half a step of bf16."""
    compare_json(tally, f"{name}/config.json", os.path.join(old, "config.json"), os.path.join(new, "config.json"))
    compare_json(tally, f"{name}/adapter_config.json", os.path.join(old, "adapter", "adapter_config.json"),
                 os.path.join(new, "adapter", "adapter_config.json"))
    for part in ("model.safetensors", os.path.join("adapter", "adapter_model.safetensors")):
        a, b = peers.load_file(os.path.join(old, part)), peers.load_file(os.path.join(new, part))
        nested = {k for k in a if any(s in k for s in (".absmax", ".nested_absmax", ".quant_state."))}
        wrong = [k for k in (a.keys() | b.keys()) - nested
                 if k not in a or k not in b or not torch.equal(a[k], b[k])]
        for k in [k[:-len(".absmax")] for k in nested if k.endswith(".weight.absmax")]:
            if not peers.relative_rms(peers.dequantise_nf4(k, b), peers.dequantise_nf4(k, a)) <= 2.0 ** -9:
                wrong.append(k)
        tally.check(f"{name}/{part}", not wrong,
                    f"{len(a)} tensors" + (f", differ: {sorted(wrong)[:3]}" if wrong else ""))


def compare_dumps(tally, name, old, new):
    """Computed values: both runs lie within their stated error of the same float64 value, so they differ by no more
    than the sum of the two errors (1e-12: that of float64 itself). bf16 yardsticks: within DRIFT16 of each other.
    Everything else: equal bits."""
    a, b = (peers.load_file(os.path.join(p, "dump.safetensors")) for p in (old, new))
    wrong, worst, drift = [k for k in a.keys() ^ b.keys()], 0.0, 1.0
    for key in a.keys() & b.keys():
        if key.startswith("err."):
            if not 0.0 <= a[key].item() < 0.05:
                wrong.append(key)
        elif key.split(".")[0] in DRIFT16:
            x, y = sorted((max(a[key].item(), FLOOR16), max(b[key].item(), FLOOR16)))
            if not y <= x * DRIFT16[key.split(".")[0]]:
                wrong.append(key)
            drift = max(drift, y / x)
        elif "err." + key in a:
            bound = a["err." + key].item() + b["err." + key].item() + 1e-12
            if a[key].shape != b[key].shape or not error(a[key], b[key].double()) <= bound * (1 + 1e-3):
                wrong.append(key)
            worst = max(worst, error(a[key], b[key].double()))
        elif not torch.equal(a[key], b[key]):
            wrong.append(key)
    tally.check(f"{name}/dump.safetensors", not wrong,
                f"{len(a)} tensors, largest relative difference {worst:.1e}, bf16 yardsticks {drift:.2f} apart"
                + (f", differ: {sorted(wrong)[:5]}" if wrong else ""))


def compare_table(tally, old, new):
    """fp32 losses: sums in another order move the first by their rounding; AdamW blows it up over the steps, to 1e-3
    at most. Distances, the largest up to each step: as other bf16 yardsticks."""
    compare_json(tally, f"{TABLE_START}/adapter_config.json", *(os.path.join(p, TABLE_START, "adapter_config.json")
                                                                for p in (old, new)))
    a, b = (peers.load_file(peers.adapter_path(os.path.join(p, TABLE_START))) for p in (old, new))
    tally.check(f"{TABLE_START}/adapter_model.safetensors",
                a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), f"{len(a)} tensors")
    tables = []
    for path in (old, new):
        with open(os.path.join(path, TABLE_FILE), encoding="utf-8") as f:
            tables.append(peers.json.load(f))
    for quant in TABLE_QUANTS:
        a, b = (t[quant] for t in tables)
        worst = max(abs(x / y - 1) for x, y in zip(a["fp32"], b["fp32"], strict=True))
        first = abs(a["fp32"][0] / b["fp32"][0] - 1)
        far = [np.maximum.accumulate(t["distance"]) for t in (a, b)]
        drift = max(max(x, y) / max(min(x, y), FLOOR16) for x, y in zip(*far, strict=True))
        tally.check(f"{TABLE_FILE} {quant}", first <= 2e-6 and worst <= 1e-3 and drift <= DRIFT16["err16"]
                    and a["options"] == b["options"],
                    f"{len(a['fp32'])} steps, fp32 losses {worst:.1e} apart, distances {drift:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=REF)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    peers.print_versions()
    torch.set_num_threads(1)
    names = args.names or list(CONFIGURATIONS) + [TABLE_FILE]
    wants_table = TABLE_FILE in names
    names = [n for n in names if n != TABLE_FILE]
    if not args.check:
        if wants_table:
            make_table(args.out)
        for name in names:
            path = os.path.join(args.out, name)
            make_model(name, path)
            describe(name, make_dump(name, path))
        return
    tally = peers.Tally()
    with tempfile.TemporaryDirectory() as temporary:
        if wants_table:
            make_table(temporary)
            compare_table(tally, args.out, temporary)
        for name in names:
            old, new = os.path.join(args.out, name), os.path.join(temporary, name)
            make_model(name, new)
            compare_models(tally, name, old, new)
            shutil.copy(os.path.join(old, "model.safetensors"), new)
            make_dump(name, new)
            compare_dumps(tally, name, old, new)
    tally.finish()


if __name__ == "__main__":
    main()
