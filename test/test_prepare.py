"""data/prepare.py: what goes in comes out of the shards, token for token; bad input ends in one clear line."""
import contextlib
import gzip
import io
import json
import pathlib
import random
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "data"))
import prepare  # noqa: E402
import text_tokenizer  # noqa: E402
import token_file  # noqa: E402


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("tokens", [3, 1 << 20])
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, tokens):
    (tmp_path / "x.bin.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError) as error:
        shard = token_file.Shard(str(tmp_path / "x.bin"), 64)
        try:
            shard.add(np.zeros(tokens, int), 0)
            shard.close([("test", [])])
        except BaseException:
            shard.abandon()
            raise
    assert error.value.filename == str(tmp_path / "x.bin") and not list(tmp_path.iterdir())


def run(*args, fails=False):
    """prepare.py with these arguments: what it prints, or the one line with which it must fail."""
    out, given = io.StringIO(), sys.argv
    sys.argv = ["prepare.py", *map(str, args)]
    try:
        with contextlib.redirect_stdout(out):
            prepare.main()
    except token_file.Fault as fault:
        assert fails and "\n" not in str(fault), fault
        return str(fault)
    finally:
        sys.argv = given
    assert not fails, out.getvalue()
    return out.getvalue()


def documents(path):
    """[(source name, ids)] of a shard."""
    s = token_file.read_shard(path)
    return [(s["sources"][s["source"][i]][0], s["tokens"][b:e].tolist())
            for i, (b, e) in enumerate(zip(s["begins"], s["begins"][1:]))]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def words(seed, count):
    rng = random.Random(seed)
    table = ["".join(rng.choice("abcdeghilnorstu") for _ in range(rng.randint(1, 8))) for _ in range(200)]
    ends = ["", "", "", ",", ".\n", "\n\n", "  ", " é", "中"]
    return " ".join(rng.choice(table) + rng.choice(ends) for _ in range(count))


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    """A small model with LLaMA's settings: BPE, byte fallback, no normalisation, dummy prefix."""
    spm = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sp")
    (folder / "text").write_text(words(1, 20000))
    spm.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=700, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=True, split_digits=True, minloglevel=2)
    return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory):
    """A byte-level BPE tokenizer.json as LLaMA-3's, with BOS and EOS named in tokenizer_config.json."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("hf")
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, show_progress=False,
                                             special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    t.train_from_iterator([words(2, 20000)], trainer)
    t.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": {"content": "<|begin_of_text|>"}, "eos_token": "<|end_of_text|>"}))
    return folder / "tokenizer.json"


def test_bytes_round_trip(tmp_path):
    texts = ["hello", "", "é\n\\ 中", words(3, 50)]
    out = run(jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts]), "-o", tmp_path / "a")
    got = documents(tmp_path / "a_000000.bin")
    assert got == [("a", [256, *t.encode()]) for t in texts if t]
    s = token_file.read_shard(tmp_path / "a_000000.bin")
    assert (s["vocab"], s["bos"], s["eos"]) == (258, 256, 257)
    total = sum(len(t.encode()) + 1 for t in texts if t)
    assert f"3 documents, {total} tokens, of these 3 BOS added" in out
    assert "empty documents skipped: 1" in out and "dropped tokens: 0" in out
    lines = (tmp_path / "a.vocab").read_text(encoding="utf-8").split("\n")
    assert len(lines) == 259 and lines[10] == "\\x0A" and lines[65] == "A" and lines[92] == "\\x5C"
    assert lines[200] == "\\xC8" and lines[256] == "<s>"


def unescape(line):
    """What a reader of PREFIX.vocab does."""
    out, raw, i = bytearray(), line.encode(), 0
    while i < len(raw):
        if raw[i:i + 2] == b"\\x":
            out.append(int(raw[i + 2:i + 4], 16))
            i += 4
        else:
            out.append(raw[i])
            i += 1
    return bytes(out)


def decoded(prefix, ids):
    pieces = [unescape(p) for p in pathlib.Path(f"{prefix}.vocab").read_text(encoding="utf-8").split("\n")]
    return b"".join(pieces[i] for i in ids).decode()


def test_sentencepiece_round_trip(tmp_path, sentencepiece_model):
    import sentencepiece
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    texts = [words(4, 300), "x", words(5, 30000), "\n\nlate <s> start 𝄞\\"]
    run(jsonl(tmp_path / "a.jsonl", [{"text": t, "meta": {"redpajama_set_name": "web"}} for t in texts]),
        "-o", tmp_path / "a", "--tokenizer", sentencepiece_model)
    got = documents(tmp_path / "a_000000.bin")
    assert [ids for _, ids in got] == [[1] + model.encode(t) for t in texts]
    assert {s for s, _ in got} == {"web"}
    for text, (_, ids) in zip(texts, got):
        assert decoded(tmp_path / "a", ids) == "<s> " + text  # the dummy prefix is a space
    assert token_file.read_shard(tmp_path / "a_000000.bin")["hash"] == text_tokenizer.file_hash(sentencepiece_model)


def test_sentencepiece_parts_equal_whole(sentencepiece_model, monkeypatch):
    t = text_tokenizer.SentencePiece(str(sentencepiece_model))
    assert t.line_prefix == 1
    text = words(6, 3000) + "\n \n\n  x\n\ty \n z" * 20
    for size in (1, 7, 100, 3000):
        monkeypatch.setattr(text_tokenizer, "CUT_CHARACTERS", size)
        assert len(t.cut(text)) > 2
        assert t.encode([text, "b"])[0].tolist() == t.model.encode(text)


def test_sentencepiece_that_rewrites_newlines_is_not_cut(tmp_path):
    spm = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text(words(1, 5000))
    spm.SentencePieceTrainer.train(input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), vocab_size=200,
                                   model_type="unigram", hard_vocab_limit=False, minloglevel=2)
    t = text_tokenizer.SentencePiece(str(tmp_path / "m.model"))
    assert t.line_prefix is None
    text = words(8, 20000)
    assert t.encode([text])[0].tolist() == t.model.encode(text)


def test_tokenizer_json(tmp_path, tokenizer_json):
    import tokenizers
    model = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    texts = [words(7, 500), "a <|begin_of_text|> in a text is text\n"]
    run(jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts]), "-o", tmp_path / "a", "--tokenizer", tokenizer_json,
        "--add_eos")
    got = [ids for _, ids in documents(tmp_path / "a_000000.bin")]
    assert got[0] == [0] + model.encode(texts[0]).ids + [1]
    assert all(0 not in ids[1:] and 1 not in ids[1:-1] for ids in got)
    for text, ids in zip(texts, got):
        assert decoded(tmp_path / "a", ids) == "<|begin_of_text|>" + text + "<|end_of_text|>"


def test_tokenizer_json_without_bos(tmp_path, tokenizer_json):
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": "<|end_of_text|>"}')
    path = jsonl(tmp_path / "a.jsonl", [{"text": "abc"}])
    run(path, "-o", tmp_path / "a", "--tokenizer", tmp_path / "tokenizer.json")
    s = token_file.read_shard(tmp_path / "a_000000.bin")
    assert s["bos"] == -1 and s["eos"] == 1 and s["tokens"][0] != 0


def test_plain_text_and_split(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\ntwo\n\nthree\r\n\n\nfour")
    run(tmp_path / "a.txt", "-o", tmp_path / "whole")
    assert documents(tmp_path / "whole_000000.bin") == [("a", [256, *b"one\ntwo\n\nthree\r\n\n\nfour"])]
    run(tmp_path / "a.txt", "-o", tmp_path / "cut", "--split", "blank", "--source", "mine")
    assert documents(tmp_path / "cut_000000.bin") == [
        ("mine", [256, *t]) for t in (b"one\ntwo\n", b"three\r\n", b"four")]
    run(tmp_path / "a.txt", "-o", tmp_path / "re", "--split", "t.*")
    assert documents(tmp_path / "re_000000.bin") == [("a", [256, *t]) for t in (b"one\n", b"\n", b"\n\nfour")]


def test_shards_val_and_tags(tmp_path):
    rows = [{"text": f"document {i:03}", "source": "ab"[i % 2]} for i in range(100)]
    with gzip.open(tmp_path / "in.jsonl.gz", "wt") as f:
        f.writelines(json.dumps(r) + "\n" for r in rows)
    run(tmp_path / "in.jsonl.gz", "-o", tmp_path / "s", "--shard_tokens", 130, "--val_documents", 3,
        "--tags", "a=[A]", "--tags", "*=<{source}>")
    train = sorted(tmp_path.glob("s_0*.bin"))
    got = [d for p in train for d in documents(p)]
    held = documents(tmp_path / "s_val_000000.bin")
    assert held + got == [(r["source"], [256, *r["text"].encode()]) for r in rows]
    assert len(held) == 3 and len(train) > 5
    for path in train:
        s = token_file.read_shard(path)
        assert len(s["tokens"]) <= 130 and s["begins"][0] == 0
        assert s["sources"] == [("a", list(b"[A]")), ("b", list(b"<b>"))]
    assert "exists" in run(tmp_path / "in.jsonl.gz", "-o", tmp_path / "s", fails=True)
    (tmp_path / "t.vocab").write_text("mine")
    assert "t.vocab exists" in run(tmp_path / "in.jsonl.gz", "-o", tmp_path / "t", fails=True)
    run(tmp_path / "in.jsonl.gz", "-o", tmp_path / "s", "--force", "--val_fraction", "0.2")
    assert len(list(tmp_path.glob("s_0*.bin"))) == 1  # the old ones are gone
    held = documents(tmp_path / "s_val_000000.bin")
    assert 5 < len(held) < 40 and len(held) + len(documents(tmp_path / "s_000000.bin")) == 100


def test_wide_tokens_and_dropping(tmp_path):
    rows = [{"input_ids": [1, 99999]}, {"input_ids": [1] + [70000] * 9}, {"input_ids": [1, 2, 3]}]
    out = run(jsonl(tmp_path / "a.jsonl", rows), "-o", tmp_path / "a", "--vocab_size", 100000, "--bos", 1,
              "--min_tokens", 2, "--max_documents", 1)
    assert documents(tmp_path / "a_000000.bin") == [("a", rows[1]["input_ids"])]
    assert "dropped tokens: 1, in 1 documents" in out and "stopped at --max_documents" in out
    assert not (tmp_path / "a.vocab").exists()


def packed_rows(length, bos=1):
    """Documents packed into rows of `length` tokens, as long-context data sets are; and the documents."""
    rng = random.Random(9)
    whole = [("src%d" % (i % 3), [bos] + [rng.randint(3, 99) for _ in range(rng.randint(1, 70))]) for i in range(60)]
    flat = [(name, t, i) for i, (name, ids) in enumerate(whole) for t in ids]
    rows = []
    for at in range(0, len(flat), length):
        part, ranges = flat[at:at + length], []
        for k, (name, _, i) in enumerate(part):
            if k == 0 or part[k - 1][2] != i:
                ranges.append({"source": name, "start": k, "end": k})
            ranges[-1]["end"] = k + 1
        rows.append({"input_ids": [t for _, t, _ in part], "labels": -100, "source": ranges})
    return rows, whole


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("length", [32, 50])
def test_rows_of_ids(tmp_path, kind, length):
    rows, whole = packed_rows(length)
    if kind == "jsonl":
        path = jsonl(tmp_path / "a.jsonl", rows)
    else:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        path = tmp_path / "a.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    out = run(path, "-o", tmp_path / "a", "--vocab_size", 100, "--bos", 1, "--eos", 2)
    assert documents(tmp_path / "a_000000.bin") == whole
    assert "joined again" in out and "of these 0 BOS added" in out and "dropped tokens: 0" in out


def test_rows_of_ids_cut_at_bos_and_without_any(tmp_path):
    rows = [{"input_ids": [1, 5, 6, 1, 7]}, {"input_ids": [8, 9, 1, 4]}]
    run(jsonl(tmp_path / "a.jsonl", rows), "-o", tmp_path / "a", "--vocab_size", 10, "--bos", 1)
    assert [ids for _, ids in documents(tmp_path / "a_000000.bin")] == [[1, 5, 6], [1, 7, 8, 9], [1, 4]]
    # no row has BOS: nothing says that one goes on with the other
    rows = [{"input_ids": [5, 6]}, {"input_ids": [8, 9]}]
    out = run(jsonl(tmp_path / "b.jsonl", rows), "-o", tmp_path / "b", "--vocab_size", 10, "--bos", 1)
    assert [ids for _, ids in documents(tmp_path / "b_000000.bin")] == [[1, 5, 6], [1, 8, 9]]
    assert "of these 2 BOS added" in out
    # no BOS in the vocabulary: EOS tells, but only once it has been seen
    run(jsonl(tmp_path / "d.jsonl", rows), "-o", tmp_path / "d", "--vocab_size", 10, "--eos", 2)
    assert [ids for _, ids in documents(tmp_path / "d_000000.bin")] == [[5, 6], [8, 9]]
    rows = [{"input_ids": [5, 2, 6], "source": [{"source": "s", "start": 0, "end": 2},
                                                {"source": "s", "start": 2, "end": 3}]},
            {"input_ids": [8, 2]}, {"input_ids": [3, 4]}]
    run(jsonl(tmp_path / "c.jsonl", rows), "-o", tmp_path / "c", "--vocab_size", 10, "--eos", 2, "--source", "s")
    assert [ids for _, ids in documents(tmp_path / "c_000000.bin")] == [[5, 2], [6, 8, 2], [3, 4]]


def test_uncovered_tokens_are_kept(tmp_path):
    row = {"input_ids": [1, 5, 6, 7, 8, 9], "source": [{"source": "s", "start": 1, "end": 3}]}
    run(jsonl(tmp_path / "a.jsonl", [row]), "-o", tmp_path / "a", "--vocab_size", 10)
    assert documents(tmp_path / "a_000000.bin") == [("a", [1]), ("s", [5, 6]), ("a", [7, 8, 9])]


@pytest.mark.parametrize("line, message", [
    ("{", "a.jsonl:2: not JSON"),
    ("[1]", "a.jsonl:2: a JSON object is expected"),
    ('{"body": "x"}', '--text_key'),
    ('{"text": 3}', 'a.jsonl:2: "text" is not a string'),
    ('{"text": "a", "source": "\\ud800"}', "a.jsonl:2: half a surrogate pair in the source name '\\ud800'"),
    ('{"text": "\\ud800"}', "a.jsonl:2: half a surrogate pair"),
    ('{"text": "x", "source": "%s"}' % ("n" * 64), "longer than 63 bytes"),
    ('{"input_ids": [1, 100]}', "a.jsonl:2: rows of input_ids need the tokenizer"),
])
def test_bad_rows(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    assert message in run(tmp_path / "a.jsonl", "-o", tmp_path / "a", fails=True)
    assert list(tmp_path.glob("a_*")) == []  # no half-made shards


@pytest.mark.parametrize("row, message", [
    ({"input_ids": [1, 100]}, "input_ids[1] is 100, outside the vocabulary of 100"),
    ({"input_ids": [1, -1]}, "input_ids[1] is -1"),
    ({"input_ids": [1.5]}, "must be a list of integers"),
    ({"input_ids": [[1], [2, 3]]}, "must be a list of integers"),
    ({"input_ids": [1, 2], "source": [{"source": "s", "start": 0, "end": 3}]}, "outside the row's 2 tokens"),
    ({"input_ids": [1, 2], "source": [{"source": "s", "start": 0}]}, "must list objects"),
    ({"input_ids": [1, 2, 3], "source": [{"source": "s", "start": 0, "end": 2}, {"source": "s", "start": 1, "end": 3}]},
     "overlap at token 1"),
    ({"text": "x"}, "text needs a tokenizer"),
])
def test_bad_ids(tmp_path, row, message):
    path = jsonl(tmp_path / "a.jsonl", [row])
    assert message in run(path, "-o", tmp_path / "a", "--vocab_size", 100, fails=True)


def test_bad_files_and_options(tmp_path):
    good = jsonl(tmp_path / "a.jsonl", [{"text": "fine"}])
    (tmp_path / "latin.txt").write_bytes(b"fine\ncaf\xe9\n")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not at all")
    (tmp_path / "bad.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 100)[:-20])
    (tmp_path / "bad.model").write_bytes(b"nothing")
    (tmp_path / "empty").mkdir()
    out = tmp_path / "o"
    assert "latin.txt:2: not UTF-8" in run(tmp_path / "latin.txt", "-o", out, fails=True)
    assert "bad.parquet: not readable" in run(tmp_path / "bad.parquet", "-o", out, fails=True)
    assert "damaged gzip" in run(tmp_path / "bad.jsonl.gz", "-o", out, fails=True)
    assert "no such file" in run(tmp_path / "none.jsonl", "-o", out, fails=True)
    assert "holds no files" in run(tmp_path / "empty", "-o", out, fails=True)
    assert "not a SentencePiece model" in run(good, "-o", out, "--tokenizer", tmp_path / "bad.model", fails=True)
    assert "no such tokenizer" in run(good, "-o", out, "--tokenizer", "nowhere.json", fails=True)
    assert "smaller than the tokenizer's" in run(good, "-o", out, "--tokenizer", "bytes", "--vocab_size", 5,
                                                fails=True)
    assert "SOURCE=TEXT" in run(good, "-o", out, "--tags", "x", fails=True)
    assert "at most 15 fit" in run(good, "-o", out, "--tags", "*=0123456789abcdef", fails=True)
    assert "all of it is held out" in run(good, "-o", out, "--val_documents", 1, fails=True)
    (tmp_path / "a.json").write_text('{"text": "fine"}')
    assert "a .json file is no text" in run(tmp_path / "a.json", "-o", out, fails=True)
    assert list(tmp_path.glob("o_*")) == []


def test_capitals_in_a_suffix(tmp_path):
    small, large = jsonl(tmp_path / "a.jsonl", [{"text": "fine"}]), jsonl(tmp_path / "B.JSONL", [{"text": "fine"}])
    for path, out in ((small, "a"), (large, "b")):
        run(path, "-o", tmp_path / out, "--tokenizer", "bytes")
    a, b = (token_file.read_shard(tmp_path / f"{out}_000000.bin")["tokens"] for out in "ab")
    assert np.array_equal(a, b)


def test_command_line(tmp_path):
    """As a user calls it: one line on stderr, a status, and the folder of the output made on the way."""
    command = [sys.executable, str(ROOT / "data" / "prepare.py")]
    path = jsonl(tmp_path / "a.jsonl", [{"text": "fine"}])
    done = subprocess.run(command + [str(path), "-o", str(tmp_path / "new" / "a")], capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "new" / "a_000000.bin").exists(), done.stderr
    done = subprocess.run(command + ["nowhere", "-o", str(tmp_path / "b")], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "prepare.py: nowhere: no such file or folder\n"
    done = subprocess.run(command + [str(path), "-o", "x", "--val_fraction", "2"], capture_output=True, text=True)
    assert done.returncode == 2 and "'2' is not a fraction" in done.stderr


def test_inspect(tmp_path):
    run(jsonl(tmp_path / "a.jsonl", [{"text": "abc", "source": "s"}]), "-o", tmp_path / "a", "--tags", "s=T")
    out = run("--inspect", tmp_path / "a_000000.bin")
    assert "4 tokens, 1 documents, vocabulary 258, bos 256" in out and "source s, tag [84]" in out
    raw = (tmp_path / "a_000000.bin").read_bytes()
    (tmp_path / "short.bin").write_bytes(raw[:-1])
    assert "truncated" in run("--inspect", tmp_path / "short.bin", fails=True)
    (tmp_path / "no.bin").write_bytes(b"x" * 2000)
    assert "not a token shard" in run("--inspect", tmp_path / "no.bin", fails=True)


def test_layout_of_the_header(tmp_path):
    """The words that core/tokens.h reads."""
    token_file.write_tokens(tmp_path / "t.bin", [[7, 5], [7, 6, 8]], vocab=70000, bos=7, eos=3, source="corpus")
    raw = (tmp_path / "t.bin").read_bytes()
    word = np.frombuffer(raw[:1024], "<i4")
    assert word[:4].tolist() == [20261120, 1, 4, 70000]
    assert word[4:11].tolist() == [5, 0, 2, 0, 1, 7, 3]
    assert np.frombuffer(raw[56:72], "<i8").tolist() == [1044, 1076]
    assert np.frombuffer(raw[1024:1044], "<u4").tolist() == [7, 5, 7, 6, 8]
    assert np.frombuffer(raw[1044:1076], "<i4").tolist() == [0, 0, 0, 0, 2, 0, 0, 0]
    assert raw[1076:1083] == b"corpus\0" and len(raw) == 1076 + 128
