"""The tokenizers of prepare.py: bytes, SentencePiece, Hugging Face tokenizer.json, or none at all.

Each has vocab, bos, eos (-1: none), name, hash (first 8 bytes of the file's SHA-256), encode(texts) -> arrays of
ids without BOS, and pieces() -> the bytes of every id, or None.
"""
import hashlib
import json
import os
import pathlib
import re

import numpy as np

from token_file import Fault

SPACE = "\u2581"  # how SentencePiece writes a space
CUT_CHARACTERS = 1 << 16


class Bytes:
    """The 256 bytes, then BOS and EOS."""
    vocab, bos, eos, name = 258, 256, 257, "bytes"
    hash = hashlib.sha256(b"bytes").digest()[:8]

    def encode(self, texts):
        return [np.frombuffer(t.encode(), np.uint8) for t in texts]

    def pieces(self):
        return [bytes([i]) for i in range(256)] + [b"<s>", b"</s>"]


class GivenIds:
    """No tokenizer, only what a shard's header must say: for rows that hold token ids."""
    name, hash = "none", bytes(8)

    def __init__(self, vocab):
        self.vocab, self.bos, self.eos = vocab, -1, -1

    def encode(self, texts):
        raise Fault("text needs a tokenizer; --vocab_size alone serves rows of input_ids")

    def pieces(self):
        return None


class SentencePiece:
    def __init__(self, path):
        import sentencepiece
        self.name, self.hash = path, file_hash(path)
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=path)
        except Exception as error:
            raise Fault(f"{path}: not a SentencePiece model: {str(error).splitlines()[0]}") from None
        self.vocab, self.bos, self.eos = self.model.vocab_size(), self.model.bos_id(), self.model.eos_id()
        self.line_prefix = self.find_line_prefix()

    def find_line_prefix(self):
        """How many tokens the model puts before a leading newline (LLaMA: 1, its dummy space), if a text may be cut
        before a newline that follows a visible character without a change of its tokens; else None.

        It may when newlines are ordinary pieces and no piece mixes one with anything else: then no merge reaches
        across the cut. Normalisation could still interfere, so a probe has the last word."""
        m, head, prefix = self.model, "A (x) y.", None
        if any("\n" in p and p.strip("\n") for p in map(m.id_to_piece, range(self.vocab))):
            return None
        if m.encode("x\n")[-1:] == [m.unk_id()]:
            return None
        for tail in ("\na", "\n\n a", "\n  b. c\n\n\n D\u00e9\u4e2d"):
            first, second, whole = m.encode(head), m.encode(tail), m.encode(head + tail)
            prefix = len(first) + len(second) - len(whole)
            if prefix < 0 or first + second[prefix:] != whole:
                return None
        return prefix

    def cut(self, text):
        """The text in parts, each but the first beginning with a newline, for all cores to work on."""
        parts, begin, border = [], 0, re.compile(r"(?<=\S)\n")
        while self.line_prefix is not None and len(text) - begin > CUT_CHARACTERS:
            match = border.search(text, begin + CUT_CHARACTERS)
            if not match:
                break
            parts.append(text[begin:match.start()])
            begin = match.start()
        return parts + [text[begin:]]

    def encode(self, texts):
        parts = [self.cut(t) for t in texts]
        encoded = iter(self.model.encode([p for ps in parts for p in ps], num_threads=os.cpu_count()))
        return [np.concatenate([np.array(next(encoded)[self.line_prefix if i else 0:], np.int32)
                                for i in range(len(ps))]) for ps in parts]

    def pieces(self):
        m = self.model

        def piece(i):
            text = m.id_to_piece(i)
            if m.is_byte(i):
                return bytes([int(text[3:5], 16)])
            return (text if m.is_control(i) or m.is_unknown(i) else text.replace(SPACE, " ")).encode()
        return [piece(i) for i in range(self.vocab)]


class HuggingFace:
    """tokenizer.json; BOS and EOS as tokenizer_config.json beside it says, else by their usual names."""

    def __init__(self, path):
        import tokenizers
        self.name, self.hash = path, file_hash(path)
        try:
            self.model = tokenizers.Tokenizer.from_file(path)
        except Exception as error:
            raise Fault(f"{path}: not a tokenizer.json: {str(error).splitlines()[0]}") from None
        self.model.no_truncation()
        self.model.no_padding()
        self.model.encode_special_tokens = True  # '<s>' in a text is text, as it is for SentencePiece
        self.vocab = max(self.model.get_vocab(with_added_tokens=True).values()) + 1
        config = pathlib.Path(path).with_name("tokenizer_config.json")
        config = read_json(config) if config.is_file() else {}
        self.bos = self.special(config, "bos_token", ["<s>", "<|begin_of_text|>", "<bos>"])
        self.eos = self.special(config, "eos_token", ["</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>"])

    def special(self, config, key, usual):
        named = config.get(key)
        named = named.get("content") if isinstance(named, dict) else named
        names = ([named] if named else []) if key in config else usual
        ids = [self.model.token_to_id(name) for name in names]
        return next((i for i in ids if i is not None), -1)

    def encode(self, texts):
        batch = getattr(self.model, "encode_batch_fast", self.model.encode_batch)
        return [np.array(e.ids, np.int32) for e in batch(texts, add_special_tokens=False)]

    def pieces(self):
        decoder = json.dumps(json.loads(self.model.to_str()).get("decoder"), ensure_ascii=False)
        special = {i for i, t in self.model.get_added_tokens_decoder().items() if t.special}
        of_character = byte_level_alphabet() if '"ByteLevel"' in decoder else {}

        def piece(i):
            text = self.model.id_to_token(i) or ""
            if i in special:
                return text.encode()
            if of_character and all(c in of_character for c in text):
                return bytes(of_character[c] for c in text)
            if '"ByteFallback"' in decoder and re.fullmatch("<0x[0-9A-F]{2}>", text):
                return bytes([int(text[3:5], 16)])
            return (text.replace(SPACE, " ") if SPACE in decoder else text).encode()
        return [piece(i) for i in range(self.vocab)]


def byte_level_alphabet():
    """GPT-2's table, character -> byte: printable bytes stand for themselves, the others are written from U+0100."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return {chr(b if b in printable else next(others)): b for b in range(256)}


def file_hash(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.digest()[:8]


def read_json(path):
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Fault(f"{path}: not JSON: {error}") from None
    return value if isinstance(value, dict) else {}


def open_tokenizer(name, vocab=None, bos=None, eos=None):
    """By file name; the numbers override what the tokenizer says."""
    if name not in (None, "bytes"):
        if not os.path.isfile(name):
            raise Fault(f"{name}: no such tokenizer file (SentencePiece .model, tokenizer.json, or 'bytes')")
        tokenizer = HuggingFace(name) if name.endswith(".json") else SentencePiece(name)
    else:
        tokenizer = GivenIds(vocab) if name is None and vocab else Bytes()
    if vocab:
        if vocab < tokenizer.vocab:
            raise Fault(f"--vocab_size {vocab} is smaller than the tokenizer's {tokenizer.vocab}")
        tokenizer.vocab = vocab
    for key, given in (("bos", bos), ("eos", eos)):
        if given is not None:
            if not -1 <= given < tokenizer.vocab:
                raise Fault(f"--{key} {given} is outside -1..{tokenizer.vocab - 1}")
            setattr(tokenizer, key, given)
    return tokenizer
