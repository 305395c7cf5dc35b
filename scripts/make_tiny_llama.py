"""Makes the default base model, dev/tiny_llama, and its fine-tuning data, data.jsonl and data_val.jsonl.

    python scripts/make_tiny_llama.py --out DIR [--data DIR] [--seed S]   train, write, probe
    python scripts/make_tiny_llama.py --out DIR --probe                   probe a model that is there

Needs torch, transformers, safetensors and tokenizers; under ten minutes on one free core. The model has the LLaMA-3
architecture and two million parameters. It is trained on statements of facts about countries (tiny_llama_corpus.py),
so that it knows the facts and not the question form, which fine-tuning on data.jsonl teaches.

The probe asks for every capital as the end of a statement and demands 95 % right. A base that fails it has not learned
its facts, whatever its loss: they come late in the training, and all at once.

The same seed gives the same text, tokenizer and data files. The weights follow in the last bits the processor and the
number of threads, so their hash does not repeat elsewhere.
"""

import argparse
import json
import math
import os
import random
import sys
import time

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

import tiny_llama_corpus as corpus

# LLaMA-3's split pattern and the order of its special tokens: part of the format that readers recognise.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
SPECIAL_TOKENS = [
    BOS, EOS, "<|reserved_special_token_0|>", "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
    "<|python_tag|>",
] + [f"<|reserved_special_token_{k}|>" for k in range(3, 8)]

VOCAB = 3072  # 256 bytes, 2,800 merges, 16 special tokens. Smaller, and Korean names fall apart into bytes.
SHAPE = {  # every matrix is a multiple of 64 both ways; three query heads share a key/value head
    "vocab_size": VOCAB,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": True,
}
ROPE_THETA = 500000.0

BATCH_TOKENS = 1024  # small batches: the facts need many steps more than they need many tokens
PEAK_LR, FINAL_LR = 2e-3, 4e-5
WARMUP = 0.03
WEIGHT_DECAY = 0.1
HELD_OUT = 65  # countries that data.jsonl never mentions
PROBE_PASS = 0.95

PROBES = [  # language, the statement up to the capital, in wordings of the corpus
    ("en", "The capital of {country} is"),
    ("en", "{country} is in {continent}. Its capital is"),
    ("ko", "{country}의 수도:"),
    ("ko", "{country|은/는} {continent}에 있다. 수도:"),
]


def make_tokenizer(texts):
    """Byte-level BPE as LLaMA-3 has it: whole pieces that are tokens are taken without merging."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    ))
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    if tokenizer.get_vocab_size() != VOCAB:
        raise SystemExit(f"the text gave {tokenizer.get_vocab_size()} tokens (need {VOCAB})")
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(
            single=f"{BOS} $A",
            pair=f"{BOS} $A {BOS}:1 $B:1",
            special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
        ),
    ])
    return tokenizer


def make_config(tokenizer):
    """config.json in the keys that both transformers 4 and 5 read: rope_theta stands alone at the top level."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **SHAPE,
        "hidden_act": "silu",
        "rope_theta": ROPE_THETA,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": tokenizer.token_to_id(EOS),
        "initializer_range": 0.02,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def make_batches(documents, rng):
    """Lists of document numbers, of like length, BATCH_TOKENS with their padding; in random order."""
    order = sorted(range(len(documents)), key=lambda k: len(documents[k]) + 8 * rng.random())
    batches, batch, longest = [], [], 0
    for k in order:
        longest = max(longest, len(documents[k]))
        if batch and longest * (len(batch) + 1) > BATCH_TOKENS:
            batches.append(batch)
            batch, longest = [], len(documents[k])
        batch.append(k)
    batches.append(batch)
    rng.shuffle(batches)
    return batches


def pad(documents, filler):
    """(inputs, targets): every document begins at position 0; targets are the next tokens, -100 behind the end."""
    longest = max(map(len, documents))
    inputs = torch.full((len(documents), longest), filler)
    targets = torch.full((len(documents), longest), -100)
    for row, ids in enumerate(documents):
        inputs[row, :len(ids)] = torch.tensor(ids)
        targets[row, :len(ids) - 1] = torch.tensor(ids[1:])
    return inputs, targets


def learning_rate(step, steps):
    """Linear warm-up, then a cosine from PEAK_LR to FINAL_LR."""
    warmup = math.ceil(WARMUP * steps)
    if step < warmup:
        return PEAK_LR * (step + 1) / warmup
    return FINAL_LR + (PEAK_LR - FINAL_LR) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def pretrain(model, documents, eos, seed):
    """Once over all documents, weights in fp32, products in bf16. Returns (steps, mean loss of the last 100)."""
    batches = make_batches(documents, random.Random(seed))
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    optimizer = torch.optim.AdamW([
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ], betas=(0.9, 0.95))
    losses, start = [], time.time()
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(batches))
        inputs, targets = pad([documents[k] for k in batch], eos)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=inputs).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == len(batches):
            recent = losses[-100:]
            print(f"step {step + 1}/{len(batches)}  loss {sum(recent) / len(recent):.3f}  {time.time() - start:.0f} s",
                  flush=True)
    recent = losses[-100:]
    return len(batches), sum(recent) / len(recent)


@torch.no_grad()
def probe(model, tokenizer, facts):
    """Share of capitals that greedy decoding gives whole, for each of PROBES: printed, and the lowest returned."""
    model.eval()
    lowest = 1.0
    for language, template in PROBES:
        right = 0
        known = [fact for fact in facts if fact["continent"] != corpus.ABSENT or "{continent}" not in template]
        for fact in known:
            capital = fact["capital" if language == "en" else "capital_ko"]
            start = [tokenizer.token_to_id(BOS)]
            start += tokenizer.encode(corpus.render(template, fact, language), add_special_tokens=False).ids
            wanted = tokenizer.encode(" " + capital, add_special_tokens=False).ids
            best = model(input_ids=torch.tensor([start + wanted])).logits[0].argmax(-1)
            # Greedy decoding gives exactly `wanted` if every token of it is the most probable one after those before.
            right += best[len(start) - 1:-1].tolist() == wanted
        print(f"probe  {100 * right / len(known):5.1f} % of {len(known)}  {template} ...", flush=True)
        lowest = min(lowest, right / len(known))
    return lowest


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=2)
        file.write("\n")


def write_model(out, model, tokenizer):
    """A Hugging Face directory. The head is the embedding, so the file has no lm_head."""
    os.makedirs(out, exist_ok=True)
    config = make_config(tokenizer)
    tensors = {name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in model.named_parameters()}
    save_file(tensors, os.path.join(out, "model.safetensors"), metadata={"format": "pt"})
    tokenizer.save(os.path.join(out, "tokenizer.json"))
    write_json(os.path.join(out, "config.json"), config)
    write_json(os.path.join(out, "generation_config.json"), {
        "bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"], "do_sample": False})
    write_json(os.path.join(out, "tokenizer_config.json"), {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS,
        "clean_up_tokenization_spaces": False, "model_max_length": SHAPE["max_position_embeddings"]})


def write_data(out, facts, seed):
    """data.jsonl: one question a country and language. data_val.jsonl: two, about countries never mentioned there."""
    os.makedirs(out, exist_ok=True)
    asked, held = corpus.split_countries(facts, seed, HELD_OUT)
    records = corpus.question_records(asked, seed, 1)
    held_records = corpus.question_records(held, seed + 1, 2)
    found = corpus.mentions(records, held)
    if found:
        raise SystemExit(f"data.jsonl mentions held-out names: {', '.join(found)}")
    for name, rows in (("data.jsonl", records), ("data_val.jsonl", held_records)):
        with open(os.path.join(out, name), "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"data.jsonl: {len(records)} records about {len(asked)} countries; "
          f"data_val.jsonl: {len(held_records)} about {len(held)} others", flush=True)


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="DIR", help="directory of the model")
    parser.add_argument("--data", metavar="DIR", help="directory of data.jsonl and data_val.jsonl (default: --out)")
    parser.add_argument("--seed", type=int, default=11, help="of text, split, weights and order (default: %(default)s)")
    parser.add_argument("--passes", type=int, default=150, help="over the countries (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: %(default)s)")
    parser.add_argument("--probe", action="store_true", help="only probe the model in --out")
    return parser.parse_args()


def main():
    options = read_arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    facts = corpus.read_facts()
    if options.probe:
        tokenizer = Tokenizer.from_file(os.path.join(options.out, "tokenizer.json"))
        model = LlamaForCausalLM.from_pretrained(options.out, dtype=torch.float32)
    else:
        write_data(options.data or options.out, facts, options.seed)
        tokenizer = make_tokenizer(corpus.tokenizer_text(facts, options.seed))
        texts = corpus.documents(facts, options.seed, options.passes)
        eos = tokenizer.token_to_id(EOS)
        documents = [encoding.ids + [eos] for encoding in tokenizer.encode_batch(texts)]
        tokens = sum(map(len, documents))
        size = sum(len(text.encode()) for text in texts)
        print(f"{len(texts)} documents, {size} bytes, {tokens} tokens, longest {max(map(len, documents))}", flush=True)
        model = LlamaForCausalLM(LlamaConfig(**make_config(tokenizer)))
        print(f"{model.num_parameters()} parameters", flush=True)
        steps, loss = pretrain(model, documents, eos, options.seed)
        print(f"{steps} steps, loss {loss:.3f}", flush=True)
        write_model(options.out, model, tokenizer)
        model = LlamaForCausalLM.from_pretrained(options.out, dtype=torch.float32)
    lowest = probe(model, tokenizer, facts)
    if lowest <= PROBE_PASS:
        print(f"error: the model does not know its facts (lowest probe {100 * lowest:.1f} %, need more than "
              f"{100 * PROBE_PASS:.0f} %)\nhint: train longer (--passes) or with another --seed", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
