#!/usr/bin/env python3
"""Loads what --save-base writes with transformers and bitsandbytes, and compares.

    check_saved_base.py [--program ./train_llama] [--logits-program build/release/logits_dump] [CASE...]

The directory must look like one that transformers writes for the same model: names, types, shapes, settings. It must
load without a missing or unexpected key and without a warning. Its weights must be those of the source, and of the
source quantised by bitsandbytes with the nearest second-level codes, bit for bit. Our logits: 1e-5 relative RMS against
PyTorch in float32 on the same weights. transformers with bitsandbytes' own product, which computes in bf16 on some
processors: at most twice PyTorch's error in bf16. Training from the directory must give the bytes that training from
the source gives.
"""

import argparse
import json
import logging
import os
import subprocess
import tempfile
import warnings

import check_training
import dump_reference
import peers
from check_training import LLAMA3, model_config
from peers import bnb, load_file, np, torch, transformers

LOGITS_BOUND = 1e-5  # PyTorch's float32 runs stay about 1e-6 from float64 here; the rest is for other orders of sums

# config: a random model is made of it; path: a model that is there. bitsandbytes' CPU product starts a new block at
# every row when a width is no multiple of 64, so such a model's logits are not taken from it.
CASES = {
    "bf16, tied": dict(config=model_config("bfloat16", True, rope_scaling=LLAMA3), dtype="bfloat16"),
    "bf16 without double quantisation": dict(config=model_config("bfloat16", False), dtype="bfloat16", single=True),
    "f16": dict(config=model_config("float16", False), dtype="float16"),
    "f32, widths of 144 and 336": dict(config=model_config("float32", False, hidden_size=144, head_dim=32,
                                                           intermediate_size=336), dtype="float32", odd=True),
    "tiny_llama": dict(path=os.path.join(dump_reference.ROOT, "dev", "tiny_llama"), dtype="bfloat16"),
}


class Listener(logging.Handler):
    """Collects what transformers and bitsandbytes warn of."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


def load_aloud(path):
    """(model, loading info, warnings) of AutoModelForCausalLM.from_pretrained, as a user would call it."""
    listener = Listener()
    loggers = [(logging.getLogger(name), logging.getLogger(name).level) for name in ("transformers", "bitsandbytes")]
    for logger, _ in loggers:
        logger.addHandler(listener)
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model, info = transformers.AutoModelForCausalLM.from_pretrained(path, device_map="cpu",
                                                                            output_loading_info=True)
    finally:
        for logger, level in loggers:
            logger.removeHandler(listener)
            logger.setLevel(level)
    return model, info, listener.said + [str(w.message) for w in caught]


def read_json(path):
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def read_bytes(path):
    with open(path, "rb") as f:
        return f.read()


def quant_state(tensors, name):
    return json.loads(bytes(tensors[name + ".quant_state.bitsandbytes__nf4"].numpy()))


def settings(tensors, name):
    """In the order in which they stand; of the offset only that it is there."""
    return [(k, k if k == "nested_offset" else v) for k, v in quant_state(tensors, name).items()]


def by_the_rule(name, tensors):
    """The weight that the stored bytes stand for, in float32 step by step, rounded to bf16."""
    codes = tensors[name].numpy().reshape(-1)
    values = tensors[name + ".quant_map"].numpy()[np.stack([codes >> 4, codes & 15], 1).reshape(-1)]
    absmax = tensors[name + ".absmax"].numpy()
    if absmax.dtype == np.uint8:
        groups = np.repeat(tensors[name + ".nested_absmax"].numpy(), 256)[:absmax.size]
        offset = np.float32(quant_state(tensors, name)["nested_offset"])
        absmax = tensors[name + ".nested_quant_map"].numpy()[absmax] * groups + offset
    shape = quant_state(tensors, name)["shape"]
    count = shape[0] * shape[1]
    weight = values[:count] * np.repeat(absmax, 64)[:count]
    return torch.from_numpy(weight).to(torch.bfloat16).reshape(shape)


def compare_form(tally, name, case, source, saved, folder):
    """Against the directory that transformers and bitsandbytes write of the same source."""
    theirs_path = os.path.join(folder, "theirs")
    peers.write_nf4_model(theirs_path, source, not case.get("single"))
    theirs = load_file(os.path.join(theirs_path, "model.safetensors"))
    ours = load_file(os.path.join(saved, "model.safetensors"))
    tally.check(f"{name}: names of the tensors", set(ours) == set(theirs),
                f"{len(ours)}" + "".join(f", {k}" for k in sorted(set(ours) ^ set(theirs))[:4]))
    settled = [k for k in theirs if ".quant_state." not in k and k in ours]
    wrong = [k for k in settled if (ours[k].dtype, ours[k].shape) != (theirs[k].dtype, theirs[k].shape)]
    tally.check(f"{name}: types and shapes", not wrong, f"{len(settled)}" + "".join(f", {k}" for k in wrong[:4]))
    linears = [k[:-len(".absmax")] for k in theirs if k.endswith(".absmax")]
    wrong = [k for k in linears if settings(ours, k) != settings(theirs, k)]
    tally.check(f"{name}: settings of the linears", not wrong, "".join(f"{k}, " for k in wrong[:4]))
    if not case.get("single"):  # the mean of absmax, which bitsandbytes takes in float32
        off = max(abs(quant_state(ours, k)["nested_offset"] / quant_state(theirs, k)["nested_offset"] - 1)
                  for k in linears)
        tally.check(f"{name}: offsets", off <= 2.0 ** -22, f"relative difference {off:.1e}")
    config, need = read_json(os.path.join(saved, "config.json")), read_json(os.path.join(source, "config.json"))
    quantised = read_json(os.path.join(theirs_path, "config.json"))["quantization_config"]
    need["quantization_config"] = dict(quantised, bnb_4bit_compute_dtype=case["dtype"])
    tally.check(f"{name}: config.json", config == need,
                ", ".join(k for k in set(config) | set(need) if config.get(k) != need.get(k)))


def compare_weights(tally, name, case, model, source, saved):
    """The loaded model's weights. Returns (tensors, weights) compared."""
    before = load_file(os.path.join(source, "model.safetensors"))
    ours = load_file(os.path.join(saved, "model.safetensors"))
    wrong, rule, plain, count, linears = [], [], [], 0, 0
    for key, p in model.named_parameters():
        if not isinstance(p, bnb.nn.Params4bit):
            if not (torch.equal(ours[key], before[key]) and ours[key].dtype == before[key].dtype and
                    torch.equal(p.data, before[key].to(p.dtype))):
                plain.append(key)
            count += p.numel()
            continue
        state = p.quant_state
        shape, dtype = state.shape, state.dtype
        state.shape, state.dtype = torch.Size([shape.numel()]), torch.float32  # flat: see CASES
        got = bnb.functional.dequantize_4bit(p.data.reshape(-1), state).reshape(shape).to(torch.bfloat16)
        state.shape, state.dtype = shape, dtype
        if not torch.equal(got, peers.round_trip_nf4(before[key], not case.get("single"))):
            wrong.append(key)
        if not torch.equal(got, by_the_rule(key, ours)):
            rule.append(key)
        count += got.numel()
        linears += 1
    tensors = len(list(model.named_parameters()))
    tally.check(f"{name}: quantised linears are the source's by bitsandbytes",
                linears == 7 * model.config.num_hidden_layers and not wrong,
                f"{linears}" + "".join(f", {k}" for k in wrong[:4]))
    tally.check(f"{name}: what bitsandbytes makes of the bytes is what the rule makes", not rule, ", ".join(rule[:4]))
    tally.check(f"{name}: all other weights are the source's", not plain, ", ".join(plain[:4]))
    return tensors, count


def our_logits(tally, name, args, model, tokens, quant):
    """None when there are none."""
    out = tokens + ".logits"
    done = subprocess.run([args.logits_program, model, "-", tokens, out, "--quant", quant], capture_output=True,
                          text=True)
    ok = tally.check(f"{name}: our logits", done.returncode == 0, done.stderr.strip()[-500:])
    if not ok:
        return None
    logits = load_file(out)["logits"].clone()
    os.remove(out)
    return logits


def compare_logits(tally, name, args, case, model, source, saved, folder):
    tokens = os.path.join(folder, "tokens.safetensors")
    ids = torch.from_numpy(np.random.default_rng(5).integers(0, model.config.vocab_size, 100).astype(np.int32))
    peers.save_file({"tokens": ids}, tokens)
    ours = our_logits(tally, name + ", saved", args, saved, tokens, "nf4")
    before = our_logits(tally, name + ", source", args, source, tokens, "nf4-single" if case.get("single") else "nf4")
    if ours is None or before is None:
        return
    tally.check(f"{name}: our logits are those of the source, bit for bit", torch.equal(ours, before))
    with torch.no_grad():
        ids = ids[None].long()
        exact, _ = peers.load_base(saved, torch.float32)
        need = exact(ids).logits[0]
        err = peers.relative_rms(ours, need)
        tally.check(f"{name}: our logits", err <= LOGITS_BOUND, f"{err:.1e} from PyTorch's (bound {LOGITS_BOUND:.0e})")
        if case.get("odd"):
            return
        rough, _ = peers.load_base(saved, torch.bfloat16)
        yardstick = peers.relative_rms(rough(ids).logits[0].float(), need)
        err = peers.relative_rms(model(ids).logits[0].float(), ours)
    tally.check(f"{name}: logits of transformers with bitsandbytes", err <= 2 * yardstick,
                f"{err:.1e} from ours (bound {2 * yardstick:.1e}, twice the error of PyTorch in bf16)")


def compare_tokenizers(tally, name, source, saved):
    text = "The quick brown fox, 1234567 of them;\n\n  naïve café 🦊<|end_of_text|>"
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(p) for p in (saved, source))
    tally.check(f"{name}: AutoTokenizer", len(ours(text).input_ids) > 10 and
                ours(text).input_ids == theirs(text).input_ids and ours.eos_token == theirs.eos_token)
    weights = {"config.json", "model.safetensors", "README.md"}
    names = sorted(set(os.listdir(source)) - weights)
    tally.check(f"{name}: files copied", sorted(set(os.listdir(saved)) - weights) == names and
                all(read_bytes(os.path.join(saved, f)) == read_bytes(os.path.join(source, f)) for f in names),
                ", ".join(names))


def compare_training(tally, name, out, out2):
    """Two runs of two steps: the same losses and the same adapter."""
    logs = [[(r["loss"], r["grad_norm"]) for r in check_training.read_log(os.path.join(o, "log.jsonl"))]
            for o in (out, out2)]
    adapters = [load_file(peers.adapter_path(o)) for o in (out, out2)]
    tally.check(f"{name}: training from the saved base", len(logs[0]) == 2 and logs[0] == logs[1] and
                set(adapters[0]) == set(adapters[1]) and
                all(torch.equal(t, adapters[1][k]) for k, t in adapters[0].items()), str(logs[0]))


def check_case(tally, name, case, args, folder):
    """Returns (tensors, weights) compared."""
    source, saved, out, out2 = (os.path.join(folder, d) for d in ("source", "saved", "out", "out2"))
    data = os.path.join(folder, "data.jsonl")
    if "path" in case:
        source = case["path"]
    else:
        peers.write_model(source, case["config"], getattr(torch, case["dtype"]), 41)
        peers.write_tokenizer(source)
    check_training.write_data(data, 320)

    def run(model, to, *more):
        return subprocess.run([args.program, "-m", model, "-i", data, "--format", "tokens", "--no-shuffle", "--math",
                               "fp32", "--device", "cpu", "-n", "2", "-b", "4", "--val", "none", "-o", to, *more],
                              capture_output=True, text=True)
    first = run(source, out, "--save-base", saved, *(["--no-double-quant"] if case.get("single") else []))
    again = run(saved, out2)
    if not tally.check(f"{name}: our program", first.returncode == 0 and again.returncode == 0,
                       (first.stderr + again.stderr).strip()[-500:] if first.returncode or again.returncode else ""):
        return 0, 0
    compare_training(tally, name, out, out2)
    if "path" not in case:
        compare_form(tally, name, case, source, saved, folder)
    model, info, said = load_aloud(saved)
    strange = {k: v for k, v in info.items() if v}
    tally.check(f"{name}: loads in transformers", not strange and not said,
                f"{strange or ''} {' | '.join(said)}".strip())
    counts = compare_weights(tally, name, case, model, source, saved)
    compare_logits(tally, name, args, case, model, source, saved, folder)
    compare_tokenizers(tally, name, source, saved)
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default="./train_llama")
    parser.add_argument("--logits-program", default="build/release/logits_dump")
    parser.add_argument("cases", nargs="*")
    args = parser.parse_args()
    peers.print_versions()
    torch.set_num_threads(1)
    tally = peers.Tally()
    found = [peers.require_file(tally, path, what) for path, what in
             ((args.program, "the training program"), (args.logits_program, "the program that writes logits"))]
    totals = np.zeros(2, np.int64)
    if all(found):
        for name in args.cases or CASES:
            with tempfile.TemporaryDirectory() as folder:
                totals += check_case(tally, name, CASES[name], args, folder)
        print(f"{totals[0]} tensors, {totals[1]} weights compared")
        tally.check("tensors and weights were compared", args.cases or totals[0] >= 100 and totals[1] >= 2_000_000)
    tally.finish()


if __name__ == "__main__":
    main()
