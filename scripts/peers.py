"""What the checks against the real libraries share: tiny models, adapters, the reference step, the tally.

Every number here comes from PyTorch, transformers, PEFT and bitsandbytes. Nothing calls our own arithmetic.
"""

import contextlib
import json
import logging
import os
import sys
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
warnings.filterwarnings("ignore", message=".*Could not find a config file.*")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import numpy as np
import peft
import safetensors
import tokenizers
import torch
import torch.utils._python_dispatch
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

try:
    import bitsandbytes as bnb
except ImportError:  # peft_step.py does without on a machine that lacks it; the comparisons need it
    bnb = None

ALL_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}

transformers.utils.logging.disable_progress_bar()


class Tally:
    """Counts checks; the last line of every script is its summary."""

    def __init__(self):
        self.passed = 0
        self.failed = 0

    def check(self, name, ok, detail=""):
        # `ok` must be a comparison that is false for NaN.
        self.passed += bool(ok)
        self.failed += not ok
        print(f"{'ok  ' if ok else 'FAIL'} {name}{': ' + detail if detail else ''}", flush=True)
        return bool(ok)

    def finish(self):
        print(f"{self.passed} passed, {self.failed} failed", flush=True)
        sys.exit(1 if self.failed or not self.passed else 0)


def print_versions():
    print("python", sys.version.split()[0], "torch", torch.__version__, "transformers", transformers.__version__,
          "peft", peft.__version__, "bitsandbytes", getattr(bnb, "__version__", "none"), "safetensors", safetensors.__version__,
          "tokenizers", tokenizers.__version__, "numpy", np.__version__, flush=True)


def require_file(tally, path, what):
    """A missing program is a failure, never a skip."""
    if os.path.exists(path):
        return True
    return tally.check(what, False, f"{path} not found; build it first")


# ---------------------------------------------------------------------------------------------------------------------
# double precision

class DoubleMode(torch.overrides.TorchFunctionMode):
    """transformers widens to float32 by name (RMSNorm, softmax, RoPE, loss). Under this mode float32 means float64, so
    that a float64 model is float64 throughout and serves as the yardstick."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def widen(x):
            return torch.float64 if x is torch.float32 else x
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*[widen(a) for a in args], **{k: widen(v) for k, v in (kwargs or {}).items()})


class NothingBelowDouble(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails when any operation, forward or backward, still produces a narrower float."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype is not torch.float64:
                raise RuntimeError(f"{func} gave {x.dtype} in a float64 run")
        return out


@contextlib.contextmanager
def precision(dtype):
    if dtype is torch.float64:
        with DoubleMode(), NothingBelowDouble():
            yield
    else:
        yield


# ---------------------------------------------------------------------------------------------------------------------
# models

def write_json(path, value):
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=2, sort_keys=True)
        f.write("\n")


def write_model(path, config, dtype, seed):
    """A random Llama as a Hugging Face directory. Weights come from numpy's generator, whose bits do not depend on the
    processor. They are larger than a fresh model's, so that attention and logits are far from uniform."""
    os.makedirs(path, exist_ok=True)
    write_json(os.path.join(path, "config.json"), config)
    rng = np.random.default_rng(seed)
    c, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    kv = config.get("num_key_value_heads") or heads
    size = config.get("head_dim") or c // heads
    shapes = {}
    for l in range(config["num_hidden_layers"]):
        p = f"model.layers.{l}."
        shapes[p + "self_attn.q_proj.weight"] = (heads * size, c)
        shapes[p + "self_attn.k_proj.weight"] = (kv * size, c)
        shapes[p + "self_attn.v_proj.weight"] = (kv * size, c)
        shapes[p + "self_attn.o_proj.weight"] = (c, heads * size)
        shapes[p + "mlp.gate_proj.weight"] = (f, c)
        shapes[p + "mlp.up_proj.weight"] = (f, c)
        shapes[p + "mlp.down_proj.weight"] = (c, f)
        shapes[p + "input_layernorm.weight"] = (c,)
        shapes[p + "post_attention_layernorm.weight"] = (c,)
    shapes["model.norm.weight"] = (c,)
    shapes["model.embed_tokens.weight"] = (v, c)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, c)
    tensors = {}
    for name, shape in shapes.items():
        x = rng.standard_normal(shape)
        if len(shape) == 1:
            x = 1.0 + 0.2 * x
        elif "embed_tokens" in name:
            x = 0.2 * x
        else:
            x = 0.7 * x / np.sqrt(shape[1])
        tensors[name] = torch.from_numpy(x).to(dtype).contiguous()
    save_file(tensors, os.path.join(path, "model.safetensors"), metadata={"format": "pt"})


def write_nf4_model(path, source, double_quant=True):
    """`source` quantised by bitsandbytes while loading and saved in its 4-bit form."""
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                             bnb_4bit_use_double_quant=double_quant,
                                             bnb_4bit_compute_dtype=torch.float32)
    with open(os.path.join(source, "config.json"), encoding="utf-8") as f:
        dtype = getattr(torch, json.load(f)["dtype"])
    model = LlamaForCausalLM.from_pretrained(source, quantization_config=config, device_map="cpu", dtype=dtype)
    model.config._name_or_path = ""
    model.save_pretrained(path)


LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                r"\s*[\r\n]+|\s+(?!\S)|\s+")


def write_tokenizer(path):
    """The smallest tokenizer of the Llama-3 kind: 256 bytes, no merges, BOS 256 and EOS 257. Our program wants one in
    every model directory, though pre-tokenised data never meets it."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    tokenizer.add_special_tokens([bos, eos])
    tokenizer.save(os.path.join(path, "tokenizer.json"))
    write_json(os.path.join(path, "tokenizer_config.json"), {"bos_token": bos, "eos_token": eos})


def dequantise_nf4(name, tensors):
    """The weight a bitsandbytes checkpoint stands for, rounded to bf16. The shape given to bitsandbytes is flat: its
    CPU kernel restarts the blocks of 64 at every row otherwise."""
    prefix = name + "."
    state = bnb.functional.QuantState.from_dict(
        {k[len(prefix):]: v for k, v in tensors.items() if k.startswith(prefix)}, torch.device("cpu"))
    shape, state.shape, state.dtype = state.shape, torch.Size([state.shape.numel()]), torch.float32
    return bnb.functional.dequantize_4bit(tensors[name].reshape(-1), state).reshape(shape).to(torch.bfloat16)


def dynamic_map():
    return bnb.functional.create_dynamic_map().numpy()


def second_level(absmax):
    """Double quantisation of absmax (F32 [blocks]): offset = mean in fp64 rounded to fp32, blocks of 256, each value
    times the reciprocal of the block's largest, nearest entry of bitsandbytes' dynamic map. Returns (nearest codes,
    absmax2, offset, scaled values F64, usable): a group whose reciprocal is not finite has no nearest entry.
    bitsandbytes' own CPU back end picks the wrong neighbour near some midpoints, so it cannot serve here."""
    groups = -(-absmax.size // 256)
    offset = np.float32(np.sum(absmax, dtype=np.float64) / absmax.size)
    centred = np.zeros(groups * 256, np.float32)
    centred[:absmax.size] = absmax - offset
    centred = centred.reshape(groups, 256)
    absmax2 = np.abs(centred).max(axis=1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        reciprocal = np.float32(1) / absmax2
        scaled = np.clip(centred * reciprocal[:, None], -1, 1).reshape(-1)[:absmax.size].astype(np.float64)
    usable = np.repeat(np.isfinite(reciprocal), 256)[:absmax.size]
    table = dynamic_map().astype(np.float64)
    codes = np.searchsorted((table[1:] + table[:-1]) / 2, np.where(usable, scaled, 0.0), side="left")
    return codes, absmax2, offset, scaled, usable


def round_trip_nf4(weight, double_quant):
    """What a 16- or 32-bit weight becomes when we quantise it ourselves: bitsandbytes' codes and absmax (flat shape),
    the second level by the nearest rule, rounded to bf16."""
    flat = weight.float().reshape(-1)
    codes, state = bnb.functional.quantize_4bit(flat, blocksize=64, quant_type="nf4", compress_statistics=False)
    if double_quant:
        nearest, absmax2, offset, _, _ = second_level(state.absmax.numpy())
        first = dynamic_map()[nearest] * np.repeat(absmax2, 256)[:nearest.size]
        state.absmax = torch.from_numpy(first + offset)
    return bnb.functional.dequantize_4bit(codes, state).reshape(weight.shape).to(torch.bfloat16)


def load_base(path, dtype, attention="eager", quant="none"):
    """A frozen LlamaForCausalLM that computes in `dtype`. Returns (model, {module: bf16 weight} of an NF4 checkpoint).
    quant: how a base that is not NF4 yet is held, none, nf4 or nf4-single."""
    config = LlamaConfig.from_pretrained(path)
    quantised = {}
    if hasattr(config, "quantization_config"):
        del config.quantization_config
        tensors = load_file(os.path.join(path, "model.safetensors"))
        for name in [k[:-len(".absmax")] for k in tensors if k.endswith(".absmax")]:
            quantised[name] = dequantise_nf4(name, tensors)
        state = {k: v for k, v in tensors.items() if not any(k == q or k.startswith(q + ".") for q in quantised)}
        state.update(quantised)
        config._attn_implementation = attention
        model = LlamaForCausalLM(config).to(dtype)
        missing, unexpected = model.load_state_dict(state, strict=False)
        if [m for m in missing if not (config.tie_word_embeddings and m == "lm_head.weight")] or unexpected:
            raise RuntimeError(f"{path}: missing {missing}, unexpected {unexpected}")
    else:
        model, info = LlamaForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention,
                                                       output_loading_info=True)
        if info["missing_keys"] or info["unexpected_keys"]:
            raise RuntimeError(f"{path}: missing {info['missing_keys']}, unexpected {info['unexpected_keys']}")
        if quant != "none":
            with torch.no_grad():
                for name, p in model.model.named_parameters():
                    if name.split(".")[-2] in ALL_LINEARS:
                        p.copy_(round_trip_nf4(p, quant == "nf4"))
    with precision(dtype):
        model.model.rotary_emb = modeling_llama.LlamaRotaryEmbedding(model.config)
    model.requires_grad_(False)
    return model.eval(), quantised


# ---------------------------------------------------------------------------------------------------------------------
# adapters

def adapter_path(path):
    return os.path.join(path, "adapter_model.safetensors")


def parameter_key(name):
    """PEFT's parameter name -> its name in the adapter file."""
    return name.replace(".default.", ".")


def trainable(model):
    return {parameter_key(n): p for n, p in model.named_parameters() if p.requires_grad}


def write_adapter(path, model_path, seed, b_scale, rank, alpha, targets, rslora=False):
    """A PEFT adapter with A ~ N(0, 1/in) and B ~ N(0, b_scale²/rank), saved by PEFT."""
    base, _ = load_base(model_path, torch.float32)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0,
                             use_rslora=rslora, bias="none", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, p in trainable(model).items():
            x = rng.standard_normal(tuple(p.shape))
            scale = 1.0 / np.sqrt(p.shape[1]) if ".lora_A." in name else b_scale / np.sqrt(rank)
            p.copy_(torch.from_numpy(x * scale))
    model.peft_config["default"].base_model_name_or_path = "tiny-random-llama"
    model.save_pretrained(path)
    readme = os.path.join(path, "README.md")
    if os.path.exists(readme):
        os.remove(readme)
    sort_json_lists(os.path.join(path, "adapter_config.json"))


def sort_json_lists(path):
    # PEFT writes the targets from a set, in an order that changes from run to run.
    with open(path, encoding="utf-8") as f:
        config = json.load(f)
    config["target_modules"] = sorted(config["target_modules"])
    write_json(path, config)


def load_adapter(base, path, dtype, train):
    """`base` with the adapter loaded by PEFT. PEFT loads with strict=False: a wrong name leaves a module at zero effect
    and only warns. So the keys of the file, and the values that arrived, are compared here."""
    model = peft.PeftModel.from_pretrained(base, path, is_trainable=train, autocast_adapter_dtype=False)
    stored = load_file(adapter_path(path))
    params = {parameter_key(n): p for n, p in model.named_parameters() if ".lora_" in n}
    missing, unexpected = sorted(set(params) - set(stored)), sorted(set(stored) - set(params))
    if missing or unexpected or not stored:
        raise RuntimeError(f"{path}: missing {missing}, unexpected {unexpected}, {len(stored)} tensors")
    for key, p in params.items():
        p.data = p.data.to(dtype)
        if p.shape != stored[key].shape or not torch.equal(p.data, stored[key].to(dtype)):
            raise RuntimeError(f"{path}: {key} did not arrive in PEFT's model")
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# one optimizer step

def document_loss(model, tokens, targets, count):
    """Cross-entropy of one document ÷ `count`, through the model's own loss. targets[i] is the id to predict at row i,
    or -1; transformers wants it at i + 1 and shifts itself. Returns (loss, logits)."""
    ids = torch.tensor(tokens, dtype=torch.long)[None]
    labels = torch.full_like(ids, -100)
    for i, t in enumerate(targets):
        if t >= 0:
            if i + 1 >= len(tokens) or tokens[i + 1] != t:
                raise RuntimeError("a target must be the next token")
            labels[0, i + 1] = t
    out = model(input_ids=ids, labels=labels, use_cache=False, num_items_in_batch=torch.tensor(count))
    return out.loss, out.logits[0]


def make_optimizer(model, lr, eps, weight_decay):
    return torch.optim.AdamW(trainable(model).values(), lr=lr, betas=(0.9, 0.999), eps=eps, weight_decay=weight_decay,
                             foreach=False, fused=False)


def backward(model, documents):
    """documents: [(tokens, targets)]. Returns the mean loss over the batch's targets, leaves its gradient in .grad."""
    count = sum(t >= 0 for _, targets in documents for t in targets)
    for p in trainable(model).values():
        p.grad = None
    total = 0.0
    for tokens, targets in documents:
        if any(t >= 0 for t in targets):
            loss, _ = document_loss(model, tokens, targets, count)
            loss.backward()
            total += loss.item()
    return total


def clip_and_update(model, optimizer, clip):
    """Returns the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(list(trainable(model).values()), clip)
    optimizer.step()
    return norm.item()


def relative_rms(a, b):
    """RMS of a - b ÷ RMS of b."""
    return ((a.double() - b.double()).pow(2).mean().sqrt() / b.double().pow(2).mean().sqrt()).item()
