"""A tiny corpus that shows whether a context is used: facts, and questions about them.

A fact is one token, "key=value" (16 keys x 16 values). A question is one token, "key?", and the token behind it is
the fact again: to predict it, a model must find the fact wherever it stands in the document. In between is noise.

    python3 data/recall.py train OUT.bin --tokens 3000000 --length 64 511
    python3 data/recall.py test OUT.bin --rows 64 --context 2048      one document a row, each key asked once
    python3 data/recall.py score TEST.bin EVAL.csv                    recall by distance and depth of the fact
"""

import argparse
import csv
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from token_file import read_shard, write_tokens, write_vocab  # noqa: E402

KEYS = VALUES = 16
QUESTION = KEYS * VALUES
NOISE, NOISES = QUESTION + KEYS, 32
BOS = NOISE + NOISES
VOCAB = BOS + 1
CELLS = 8


def fact(key, value):
    return key * VALUES + value


def pieces():
    names = [f" k{k}=v{v}" for k in range(KEYS) for v in range(VALUES)]
    return names + [f" k{k}?" for k in range(KEYS)] + [" ."] * NOISES + ["<s>"]


def asked_in_blocks(random, length):
    """Facts, then again and again a stretch of noise and questions about some of them, each key once a block. The
    stretches are log-uniform, so that all distances occur."""
    values = random.integers(VALUES, size=KEYS)
    keys = random.permutation(KEYS)[: random.integers(4, KEYS + 1)]
    tokens = [BOS] + [fact(k, values[k]) for k in keys]
    while len(tokens) < length:
        stretch = int(np.exp(random.uniform(0, np.log(length))))
        tokens += (NOISE + random.integers(NOISES, size=stretch)).tolist()
        for k in random.permutation(keys)[: random.integers(1, len(keys) + 1)]:
            tokens += [QUESTION + k, fact(k, values[k])]
    return tokens[:length]


def asked_at_random(random, length):
    """Questions anywhere, about few or many keys, some of them favourites, in little or much noise: the short
    distances here teach the task, the long ones of asked_in_blocks are then learnt."""
    values = random.integers(VALUES, size=KEYS)
    keys = random.permutation(KEYS)[: random.integers(2, KEYS + 1)]
    weights = random.choice([0.6, 0.8, 0.9, 1.0]) ** random.permutation(KEYS)
    noise = random.choice([0, 0.5, 0.8, 0.95])
    tokens, known = [BOS], 0
    while len(tokens) < length:
        if known < len(keys) and random.random() < 0.3:
            tokens.append(fact(keys[known], values[keys[known]]))
            known += 1
        elif known and random.random() >= noise and len(tokens) + 2 <= length:
            share = weights[:known] / weights[:known].sum()
            k = random.choice(keys[:known], p=share)
            tokens += [QUESTION + k, fact(k, values[k])]
        else:
            tokens.append(NOISE + random.integers(NOISES))
    return tokens


def training_document(random, length):
    return (asked_in_blocks if random.random() < 0.5 else asked_at_random)(random, length)


def test_document(random, length):
    """Each fact stands once and is asked for once, both anywhere: distance and depth are spread evenly."""
    tokens = NOISE + random.integers(NOISES, size=length)
    tokens[0] = BOS
    keys = min(KEYS, (length // 2 - 1) // 2)
    slots = random.permutation(np.arange(1, length // 2))[: 2 * keys].reshape(keys, 2) * 2
    for key, (first, second) in zip(random.permutation(KEYS), np.sort(slots, axis=1)):
        answer = fact(key, random.integers(VALUES))
        tokens[first] = answer
        tokens[second - 1 : second + 1] = QUESTION + key, answer
    return tokens.tolist()


def grid(test_file, scores_file):
    """Hits and questions, each (CELLS, CELLS): rows by depth of the fact, columns by distance from it."""
    shard = read_shard(test_file)
    documents = np.split(shard["tokens"], shard["begins"][1:-1])
    length = len(documents[0])
    hits, asked = np.zeros((CELLS, CELLS)), np.zeros((CELLS, CELLS))
    with open(scores_file) as file:
        for line in csv.DictReader(file):
            row, at, label = int(line["row"]), int(line["index"]), int(line["label"])
            if row < len(documents) and at < length and not QUESTION <= documents[row][at] < NOISE:
                continue
            if row >= len(documents) or at >= length or label not in documents[row]:
                sys.exit(f"{scores_file}: not the scores of {test_file} with -c {length}")
            where = int(np.flatnonzero(documents[row] == label)[0])
            cell = where * CELLS // length, (at + 1 - where) * CELLS // length
            asked[cell] += 1
            hits[cell] += int(line["correct"])
    return hits, asked


def score(test_file, scores_file):
    hits, asked = grid(test_file, scores_file)
    recall = hits.sum() / asked.sum()
    print(f"recall {recall:.3f} over {int(asked.sum())} questions; by distance:", end="")
    for distance in range(CELLS):
        print(f" {hits[:, distance].sum() / max(asked[:, distance].sum(), 1):.2f}", end="")
    print()
    return recall


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="documents to train on")
    train.add_argument("out")
    train.add_argument("--tokens", type=int, default=3_000_000)
    train.add_argument("--length", type=int, nargs=2, default=[64, 511], metavar=("FROM", "TO"))
    test = commands.add_parser("test", help="documents that fill a row each")
    test.add_argument("out")
    test.add_argument("--rows", type=int, default=64)
    test.add_argument("--context", type=int, default=2048)
    scored = commands.add_parser("score", help="recall from the CSV of train_llama --eval")
    scored.add_argument("test")
    scored.add_argument("csv")
    for command in (train, test):
        command.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    if args.command == "score":
        score(args.test, args.csv)
        return
    random = np.random.default_rng(args.seed)
    documents, count = [], 0
    if args.command == "train":
        while count < args.tokens:
            documents.append(training_document(random, int(random.integers(args.length[0], args.length[1] + 1))))
            count += len(documents[-1])
    else:
        documents = [test_document(random, args.context) for _ in range(args.rows)]
        count = args.rows * args.context
    write_tokens(args.out, documents, VOCAB, bos=BOS, source="recall")
    write_vocab(pathlib.Path(args.out).with_suffix(".vocab"), [p.encode() for p in pieces()])
    print(f"{args.out}: {len(documents)} documents, {count} tokens, vocabulary {VOCAB}")


if __name__ == "__main__":
    main()
