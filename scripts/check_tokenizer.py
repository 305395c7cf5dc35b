#!/usr/bin/env python3
"""Our token ids against those of HF tokenizers, on a multilingual corpus that this script makes.

    scripts/check_tokenizer.py [--program build/release/tokenize] [--llama3 ../shared/llama3_tokenizer]

Tokenizers: the Llama-3 vocabulary where it is available, dev/tiny_llama's, one in the style of SmolLM2 and one with
Llama-3's pattern but merges only; the last two are trained here. For each:
  1. every code point (all assigned ones, samples of the rest) in a probe text. The Unicode versions of PCRE2 and of
     HF tokenizers differ; the code points that are newer than PCRE2's are counted, any other difference fails.
  2. the corpus, without those newer code points, with special tokens parsed and not: every id must be equal.
The last line is "N passed, N failed"; exit status 1 when anything failed.
"""
import argparse
import glob
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import unicodedata

os.environ["TOKENIZERS_PARALLELISM"] = "false"
import tokenizers  # noqa: E402
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
CORPUS_BYTES = 3_000_000
WHITE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2003\u200a\u2028\u2029\u202f\u205f\u3000"
NEARLY_WHITE = "\x1c\x1f\u180e\u200b\u200d\u2060\ufeff\0"
SCRIPTS = {  # first and last code point of what words are drawn from
    "Latin": (0x61, 0x7A), "Latin-1": (0xC0, 0x17F), "IPA": (0x250, 0x2AF), "Greek": (0x370, 0x3FF),
    "Cyrillic": (0x400, 0x52F), "Armenian": (0x531, 0x58F), "Hebrew": (0x591, 0x5F4), "Arabic": (0x600, 0x6FF),
    "Syriac": (0x700, 0x74F), "Thaana": (0x780, 0x7B1), "NKo": (0x7C0, 0x7FA), "Devanagari": (0x900, 0x97F),
    "Bengali": (0x980, 0x9FE), "Gurmukhi": (0xA01, 0xA76), "Gujarati": (0xA81, 0xAFF), "Tamil": (0xB82, 0xBFA),
    "Telugu": (0xC00, 0xC7F), "Kannada": (0xC80, 0xCF2), "Malayalam": (0xD00, 0xD7F), "Sinhala": (0xD81, 0xDF4),
    "Thai": (0xE01, 0xE5B), "Lao": (0xE81, 0xEDF), "Tibetan": (0xF00, 0xFDA), "Myanmar": (0x1000, 0x109F),
    "Georgian": (0x10A0, 0x10FF), "Jamo": (0x1100, 0x11FF), "Ethiopic": (0x1200, 0x139F),
    "Cherokee": (0x13A0, 0x13FD), "Canadian": (0x1400, 0x167F), "Khmer": (0x1780, 0x17F9),
    "Mongolian": (0x1800, 0x18AA), "Vietnamese": (0x1EA0, 0x1EFF), "Greek ext.": (0x1F00, 0x1FFE),
    "Kana": (0x3041, 0x30FF), "Bopomofo": (0x3105, 0x312F), "CJK": (0x4E00, 0x9FFF), "CJK A": (0x3400, 0x4DBF),
    "Yi": (0xA000, 0xA48C), "Vai": (0xA500, 0xA62B), "Hangul": (0xAC00, 0xD7A3), "Forms": (0xFB00, 0xFDFF),
    "Fullwidth": (0xFF01, 0xFFEF), "Gothic": (0x10330, 0x1034A), "Cuneiform": (0x12000, 0x12399),
    "Hieroglyphs": (0x13000, 0x1342E), "Math": (0x1D400, 0x1D7FF), "Adlam": (0x1E900, 0x1E95F),
    "CJK B": (0x20000, 0x2A6DF),
}


def version_of(text):
    return tuple(int(part) for part in text.split("."))


def ours(program, folder, texts, parse_special):
    """Ids of each text, and the Unicode version of the split pattern."""
    data = b"".join(struct.pack("<I", len(b)) + b for b in (t.encode() for t in texts))
    command = [program, folder] + (["--parse-special"] if parse_special else [])
    done = subprocess.run(command, input=data, capture_output=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.decode(errors='replace')}")
    out, at, ids = done.stdout, 0, []
    while at < len(out):
        (count,) = struct.unpack_from("<I", out, at)
        ids.append(list(struct.unpack_from(f"<{count}i", out, at + 4)))
        at += 4 + 4 * count
    return ids, done.stderr.decode().strip().splitlines()[-1]


def theirs(tokenizer, texts, parse_special):
    tokenizer.encode_special_tokens = not parse_special
    return [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]


def probe_points():
    """All planes that hold assigned characters, and samples of the others."""
    rng = random.Random(3)
    points = [c for c in range(0x33480) if not 0xD800 <= c <= 0xDFFF] + list(range(0xE0000, 0xE1000))
    return points + sorted(rng.sample(range(0x33480, 0xE0000), 4000) + rng.sample(range(0xE1000, 0x110000), 4000))


def words(rng, alphabet, letters):
    """Words of one script with marks, ASCII punctuation, digits and line ends between them."""
    out = []
    while sum(map(len, out)) < letters:
        out.append("".join(rng.choices(alphabet, k=rng.randrange(1, 9))))
        out.append(rng.choice([" ", " ", " ", " ", ", ", ". ", "\n", "-", "'", "’", " (", ") ", "1", "\u0301", "  "]))
    return "".join(out)


def emoji(rng):
    people, things = "👨👩🧑👧👦🙂🦙🚀🎉❤☺✈☎", "🏻🏼🏽🏾🏿"
    flags = "".join(chr(0x1F1E6 + rng.randrange(26)) for _ in range(2))
    parts = [rng.choice(people), rng.choice(people) + "\u200d" + rng.choice(people), rng.choice(people) + "\ufe0f",
             rng.choice(people) + rng.choice(things), flags, rng.choice("0123456789#*") + "\ufe0f\u20e3", " ", "wow"]
    return "".join(rng.choices(parts, k=rng.randrange(1, 12)))


def numbers(rng):
    pools = ["0123456789", "٠١٢٣٤٥٦٧٨٩", "०१२३४५६७८९", "０１２３４５６７８９", "½¼¾²³¹₀₁", "ⅠⅡⅧⅿ", "一二三", "0123456789,.-+e/: "]
    count = rng.randrange(1, 12)
    return " ".join("".join(rng.choices(rng.choice(pools), k=rng.randrange(1, 12))) for _ in range(count))


def whitespace(rng):
    pool = WHITE * 2 + NEARLY_WHITE + " " * 30 + "\n" * 12 + "\r" * 6 + "ab1.!('é한"
    return "".join(rng.choices(pool, k=rng.randrange(1, 60)))


def contractions(rng):
    pool = ["'", "'", "’", "s", "S", "ſ", "t", "T", "re", "RE", "rE", "ve", "m", "ll", "LL", "l", "d", "K", "a", " ",
            "1", "\n", "ß", "ŉ"]
    return "".join(rng.choices(pool, k=rng.randrange(2, 24)))


def runs(rng):
    character = rng.choice(["a", " ", "\n", "0", "-", "=", "é", "한", "🙂", "\t", ".", "\r\n", "ab", " a", "\u3000"])
    return character * rng.choice([1, 2, 3, 5, 8, 13, 40, 81, 95, 96, 97, 98, 127, 200, 1000, 5000])


def assigned_points():
    return [chr(c) for c in range(0x110000)
            if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]


def python_code(size):
    texts, total = [], 0
    for path in sorted(glob.glob(os.path.join(os.path.dirname(os.__file__), "*.py"))):
        with open(path, encoding="utf-8", errors="replace") as f:
            text = f.read(20_000)
        texts.append(text)
        total += len(text)
        if total > size:
            break
    return texts


def prose(size):
    import pydoc_data.topics
    return "\n".join(pydoc_data.topics.topics.values())[:size].split("\n\n\n")


def corpus(tokenizer, seed):
    """Named lists of texts. The vocabulary section joins tokens of this tokenizer: it reaches entries that random
    text never would."""
    rng = random.Random(seed)
    everything = assigned_points()
    sections = {"prose": prose(400_000), "code": python_code(500_000)}
    for name, (first, last) in SCRIPTS.items():
        alphabet = [chr(c) for c in range(first, last + 1) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]
        sections[name] = [words(rng, alphabet, 200) for _ in range(40)]
    for name, make, count in (("emoji", emoji, 2000), ("numbers", numbers, 3000), ("whitespace", whitespace, 6000),
                              ("contractions", contractions, 4000), ("runs", runs, 150)):
        sections[name] = [make(rng) for _ in range(count)]
    sections["random"] = ["".join(rng.choices(everything, k=rng.randrange(1, 60))) for _ in range(5000)]
    tokens = [tokenizer.decode([i], skip_special_tokens=False) for i in range(tokenizer.get_vocab_size())]
    tokens = [t for t in tokens if t and "\ufffd" not in t]
    sections["vocabulary"] = [rng.choice(["", " ", "\n"]).join(rng.choices(tokens, k=20)) for _ in range(6000)]
    added = [t.content for t in tokenizer.get_added_tokens_decoder().values()]
    pieces = added + [a[:-1] for a in added] + ["<|", "|>", "<", " ", "x", "user\n\n"]
    sections["special"] = ["".join(rng.choices(pieces, k=rng.randrange(1, 12))) for _ in range(3000)] if added else []
    sections["more random"] = []
    size = sum(len(t.encode()) for texts in sections.values() for t in texts)
    while size < CORPUS_BYTES:
        text = words(rng, rng.choices(everything, k=40), 400)
        sections["more random"].append(text)
        size += len(text.encode())
    return sections


def write_config(folder, bos, eos):
    with open(os.path.join(folder, "tokenizer_config.json"), "w") as f:
        json.dump({"bos_token": bos, "eos_token": eos, "model_max_length": 1e30}, f)


def train(folder, style):
    """A small vocabulary of its own for the SmolLM2 pattern, or for Llama-3's without ignore_merges."""
    os.makedirs(folder)
    tokenizer = Tokenizer(models.BPE())
    if style == "smollm2":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True),
             pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
             pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        special = []
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=6000, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    rng = random.Random(5)
    texts = prose(400_000) + python_code(300_000) + [numbers(rng) for _ in range(500)] + [runs(rng) for _ in range(20)]
    for first, last in SCRIPTS.values():
        texts += [words(rng, [chr(c) for c in range(first, min(last, first + 60))
                              if unicodedata.category(chr(c)) != "Cn"], 200) for _ in range(10)]
    tokenizer.train_from_iterator(texts, trainer)
    if style != "smollm2":
        tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
        special = ["<|begin_of_text|>", "<|end_of_text|>"]
    # neither special; the second is matched in a second pass, after the tokens that are not "normalized"
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("<thinking>", normalized=True),
                          AddedToken("x<|", normalized=True), AddedToken("  <think", normalized=True)])
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    write_config(folder, special[0], special[1])


def show(text, at):
    return json.dumps(text[max(0, at - 20):at + 20])


def check_points(name, program, folder, tokenizer):
    """(passed, the code points whose class differs because they are newer than PCRE2's Unicode)"""
    points = probe_points()
    texts = ["a{0}b 1{0}1 {0}{0}\n'{0}".format(chr(c)) for c in points]
    mine, unicode_version = ours(program, folder, texts, True)
    reference = theirs(tokenizer, texts, True)
    python_newer = version_of(unicodedata.unidata_version) > version_of(unicode_version)
    newer, wrong = set(), []
    for c, a, b in zip(points, mine, reference):
        if a != b:
            if unicodedata.category(chr(c)) == "Cn" or python_newer:
                newer.add(chr(c))
            else:
                wrong.append(c)
    print(f"{name}: {len(points)} code points probed, {len(wrong)} differ, {len(newer)} newer than Unicode "
          f"{unicode_version} differ (counted apart)")
    for c in wrong[:10]:
        print(f"  U+{c:04X} {unicodedata.name(chr(c), '?')}")
    return not wrong, newer


def check_corpus(name, program, folder, tokenizer, newer):
    """(passed, failed) over the two ways of treating special tokens."""
    sections = corpus(tokenizer, 11)
    without = str.maketrans("", "", "".join(newer))
    texts, owner, dropped = [], [], 0
    for section, members in sections.items():
        for text in members:
            kept = text.translate(without)
            dropped += len(text) - len(kept)
            texts.append(kept)
            owner.append(section)
    passed = failed = 0
    for parse_special in (True, False):
        mine, _ = ours(program, folder, texts, parse_special)
        reference = theirs(tokenizer, texts, parse_special)
        wrong = [i for i, (a, b) in enumerate(zip(mine, reference)) if a != b]
        size = sum(len(t.encode()) for t in texts)
        count = sum(map(len, reference))
        how = "special tokens parsed" if parse_special else "special tokens as text"
        ok = not wrong and len(mine) == len(texts)
        print(f"{name}, {how}: {len(texts)} texts, {size} bytes, {count} ids, {len(wrong)} texts differ, "
              f"{dropped} newer characters left out")
        for i in wrong[:5]:
            at = next((k for k, (a, b) in enumerate(zip(mine[i], reference[i])) if a != b), 0)
            near = len(tokenizer.decode(reference[i][:at], skip_special_tokens=False))
            print(f"  {owner[i]}: near {show(texts[i], near)}: ours {mine[i][at:at + 6]}, "
                  f"theirs {reference[i][at:at + 6]}")
        passed += ok
        failed += not ok
    return passed, failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default=os.path.join(ROOT, "build/release/tokenize"))
    parser.add_argument("--llama3", default=os.path.join(ROOT, "../shared/llama3_tokenizer"))
    args = parser.parse_args()
    print(f"tokenizers {tokenizers.__version__}, Python's Unicode {unicodedata.unidata_version}")
    passed = failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"llama3": args.llama3, "tiny_llama": os.path.join(ROOT, "dev/tiny_llama")}
        for style in ("smollm2", "merges"):
            folders[style] = os.path.join(scratch, style)
            train(folders[style], style)
        for name, folder in folders.items():
            path = os.path.join(folder, "tokenizer.json")
            if not os.path.exists(path):
                print(f"{name}: skipped, no {path}")
                continue
            tokenizer = Tokenizer.from_file(path)
            ok, newer = check_points(name, args.program, folder, tokenizer)
            good, bad = check_corpus(name, args.program, folder, tokenizer, newer)
            passed += ok + good
            failed += (not ok) + bad
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
