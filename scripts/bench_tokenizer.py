#!/usr/bin/env python3
"""Speed of our tokenizer against tiktoken (PyPI), one thread each, on the same texts with the Llama-3 vocabulary.

    scripts/bench_tokenizer.py --tokenizer DIR [--program build/release/bench_tokenizer] [--rounds 9]

DIR holds the Llama-3 tokenizer.model (and tokenizer.json). The texts are English prose and Python code from the
standard library, and a Korean mix made here; about 2 MB each, cut into records of 2,000 characters. The two programs
take turns; the figure is the ratio of the medians. tiktoken is called by whichever of its two ways is faster.
Exit status 1 when the token counts differ or when ours is slower on any text.
"""
import argparse
import base64
import glob
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time

import tiktoken

SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
SIZE = 2_000_000
RECORD = 2_000


def prose():
    import pydoc_data.topics
    return "\n\n".join(pydoc_data.topics.topics.values())


def code():
    folder = os.path.dirname(os.__file__)
    text = ""
    for path in sorted(glob.glob(os.path.join(folder, "*.py"))):
        with open(path, encoding="utf-8") as f:
            text += f.read()
        if len(text) > SIZE:
            break
    return text


def korean():
    """Sentences of Korean stems and endings with English names, numbers and punctuation between them."""
    rng = random.Random(1)
    stems = ("나라 수도 사람 학교 언어 모델 자료 문장 시간 도시 바다 강물 음식 역사 기술 연구 회사 정부 경제 문화 "
             "음악 영화 책상 창문 컴퓨터 전화 인터넷 여행 가족 친구 선생님 학생 의사 병원 시장 가격 은행 도서관 "
             "박물관 공원 기차 버스 비행기 날씨 여름 겨울 아침 저녁 오늘 내일").split()
    endings = "은 는 이 가 을 를 에 에서 으로 의 와 과 도 만 까지 부터 보다 처럼".split()
    verbs = ("있습니다 없습니다 갔다 왔어요 만들었다 배우고 있다 생각합니다 말했다 보았다 좋아한다 공부했습니다 "
             "시작된다 끝났다 바뀌었다 알려져 있다").split(" ")
    names = "Seoul Busan Python GPU LLaMA Kim Park 2024년 3.14 100% 1,250원 A/S".split()
    out = []
    length = 0
    while length < SIZE // 2:
        words = [rng.choice(stems) + rng.choice(endings) for _ in range(rng.randrange(2, 9))]
        if rng.random() < 0.5:
            words.insert(rng.randrange(len(words)), rng.choice(names))
        sentence = " ".join(words) + " " + rng.choice(verbs) + rng.choice([". ", ". ", "? ", "!\n", ".\n\n"])
        out.append(sentence)
        length += len(sentence)
    return "".join(out)


def cut(text):
    text = text.replace("\0", "")
    while len(text.encode()) < SIZE:
        text += text
    text = text.encode()[:SIZE].decode("utf-8", "ignore")
    return [text[i:i + RECORD] for i in range(0, len(text), RECORD)]


def tiktoken_encoding(folder):
    ranks = {}
    with open(os.path.join(folder, "tokenizer.model"), "rb") as f:
        for line in f:
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
    return tiktoken.Encoding("llama3", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={})


def timed(function, records):
    begin = time.perf_counter()
    tokens = 0
    for record in records:
        tokens += len(function(record))
    return time.perf_counter() - begin, tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--program", default="build/release/bench_tokenizer")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    encoding = tiktoken_encoding(args.tokenizer)
    ways = {"encode_ordinary": encoding.encode_ordinary, "encode_to_numpy": encoding.encode_to_numpy}
    print(f"tiktoken {tiktoken.__version__}, 1 thread each, {args.rounds} rounds in turn, medians")
    print(f"{'text':8} {'MB':>5} {'tokens':>8} {'ours MB/s':>10} {'tiktoken MB/s':>14} {'ratio':>6}")
    failed = 0
    for name, make in (("prose", prose), ("code", code), ("korean", korean)):
        records = cut(make())
        size = sum(len(r.encode()) for r in records) / 1e6
        with tempfile.NamedTemporaryFile(suffix=".txt") as f:
            f.write("\0".join(records).encode())
            f.flush()
            ours = subprocess.Popen([args.program, args.tokenizer, f.name], stdin=subprocess.PIPE,
                                    stdout=subprocess.PIPE, text=True)
            theirs_s = {way: [] for way in ways}
            ours_s = []
            for _ in range(args.rounds):
                for way, function in ways.items():
                    seconds, theirs_n = timed(function, records)
                    theirs_s[way].append(seconds)
                ours.stdin.write("\n")
                ours.stdin.flush()
                seconds, tokens = ours.stdout.readline().split()
                ours_s.append(float(seconds))
            ours.stdin.close()
            ours.wait()
        a = statistics.median(ours_s)
        b = min(statistics.median(s) for s in theirs_s.values())
        ok = int(tokens) == theirs_n and b >= a
        failed += not ok
        note = "" if ok else "  FAILED" if int(tokens) == theirs_n else f"  FAILED: {theirs_n} tokens in tiktoken"
        print(f"{name:8} {size:5.2f} {tokens:>8} {size / a:10.1f} {size / b:14.1f} {b / a:6.2f}{note}")
    print(f"{3 - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
