#!/usr/bin/env python3
"""The program against Hugging Face transformers, both ways, with models that transformers itself writes.

    make train_llama && python3 dev/check_hf.py        # needs torch, transformers 5, numpy; CPU only, a minute or two

For each family, in fp32 and bf16, in several shards: save_pretrained -> convert_hf.py -> train_llama --dump_logits
must give transformers' logits (in fp32, largest difference within 1e-4 of the largest logit); export_hf.py must give
back the same bytes; and transformers must open the export and compute the same again. Every RoPE scaling likewise,
on rows longer than the original context. Then a model trained here from scratch, and a converted one trained on with
a larger RoPE base: exported, opened by transformers, same logits. One line a check, status 1 when one fails.
"""
import argparse
import copy
import filecmp
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback

import numpy as np
import torch
import transformers

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "data"), str(ROOT / "scripts"), str(ROOT / "test")]
import hashed  # noqa: E402
import token_file  # noqa: E402

TOLERANCE = 1e-4
VOCAB, TOKENS = 512, 96
SHAPE = dict(vocab_size=VOCAB, hidden_size=128, intermediate_size=320, num_hidden_layers=3, num_attention_heads=4,
             rms_norm_eps=1e-5, initializer_range=0.08)
ROPE = {"rope_type": "default", "rope_theta": 1e4}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
RAMP = [1.0 + 0.4 * i for i in range(16)]
FAMILIES = {
    "llama2": ("LlamaForCausalLM", dict(num_key_value_heads=4, max_position_embeddings=128, rope_parameters=ROPE)),
    "llama3": ("LlamaForCausalLM", dict(num_key_value_heads=2, max_position_embeddings=512, rope_parameters=LLAMA3)),
    "mistral": ("MistralForCausalLM", dict(num_key_value_heads=1, head_dim=48, max_position_embeddings=128,
                                           sliding_window=None, rope_parameters=dict(ROPE, rope_theta=1e6))),
    "qwen2": ("Qwen2ForCausalLM", dict(num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None,
                                       eos_token_id=2, tie_word_embeddings=True, use_sliding_window=False,
                                       rope_parameters=dict(ROPE, rope_theta=1e6))),
}
SCALINGS = {
    "linear": (64, {"factor": 4.0}),
    "dynamic": (64, {"factor": 2.0}),
    "yarn": (256, {"factor": 4.0, "original_max_position_embeddings": 64}),
    "longrope": (256, {"short_factor": [1.0] * 16, "long_factor": RAMP, "factor": 4.0,
                       "original_max_position_embeddings": 64}),
}

passed, failed = 0, 0


def check(title, what):
    """Runs one check; `what` returns a remark or raises. Returns whether it passed."""
    global passed, failed
    try:
        remark = what()
    except Exception as error:
        failed += 1
        last = traceback.extract_tb(error.__traceback__)[-1]
        print(f"FAIL  {title}: {str(error).strip() or type(error).__name__} ({last.name}:{last.lineno})", flush=True)
        return False
    passed += 1
    print(f"PASS  {title}{f': {remark}' if remark else ''}", flush=True)
    return True


def call(*command, cwd=None):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").splitlines()
        raise RuntimeError(f"{pathlib.Path(str(command[0])).name}: {lines[-1]}")
    return done.stdout


def script(name, *args):
    return call(sys.executable, ROOT / "scripts" / name, *args)


def tokens_for(bos):
    ids = hashed.model_tokens({"vocab_size": VOCAB, "bos_token_id": None if bos < 0 else bos}, TOKENS)
    return [int(i) for i in ids]


def program_logits(binary, model, folder, bos):
    ids = tokens_for(bos)
    token_file.write_tokens(folder / "tokens.bin", [ids], VOCAB, bos)
    call(binary, "--device", "cpu", "--dtype", "float", "--attention", "full", "-c", TOKENS, "-e", model,
         "-i", folder / "tokens.bin", "--dump_logits", folder / "logits")
    return np.fromfile(folder / "logits", "<f4").reshape(TOKENS, VOCAB)


def transformers_logits(folder, bos):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                              attn_implementation="eager").eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens_for(bos)]), use_cache=False).logits[0].float().numpy()


def same_logits(ours, theirs):
    scale, error = np.abs(theirs).max(), np.abs(ours - theirs).max()
    if not error <= TOLERANCE * scale:
        raise RuntimeError(f"largest difference {error:.3g} at logits up to {scale:.3g}")
    return f"largest difference {error / scale:.1e} of the scale {scale:.3g}"


def same_bytes(a, b):
    names = sorted(f.name for f in a.glob("*.safetensors*"))
    if names != sorted(f.name for f in b.glob("*.safetensors*")):
        raise RuntimeError(f"other files: {sorted(f.name for f in b.iterdir())}")
    differ = [n for n in names if not filecmp.cmp(a / n, b / n, shallow=False)]
    if differ:
        raise RuntimeError(f"{differ} differ")
    for file in a.iterdir():
        if not (b / file.name).exists():
            raise RuntimeError(f"{file.name} is not in the export")
    return f"{len(names)} files"


def save_random_model(folder, architecture, fields, dtype, shard_size):
    model_class = getattr(transformers, architecture)
    torch.manual_seed(1)
    model = model_class(model_class.config_class(**SHAPE, **copy.deepcopy(fields)))
    with torch.no_grad():  # norms and biases are born as ones and zeros: make them matter
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)


def check_round_trip(binary, folder, title, architecture, fields, dtype, shard_size):
    folder.mkdir()
    bos = -1 if architecture.startswith("Qwen2") else 1
    hf, model, out = folder / "hf", folder / "model.bin", folder / "out"
    reference = []

    def save():
        save_random_model(hf, architecture, fields, dtype, shard_size)
        reference.append(transformers_logits(hf, bos))
        return f"{len(list(hf.glob('*.safetensors')))} shards"
    steps = (
        ("transformers writes", save),
        ("convert", lambda: script("convert_hf.py", hf, model, "--binary", binary).count("note:") and "with a note"),
        ("logits", lambda: same_logits(program_logits(binary, model, folder, bos), reference[0])),
        ("export", lambda: script("export_hf.py", model, out, "--binary", binary) and ""),
        ("bytes", lambda: same_bytes(hf, out)),
        ("transformers opens the export", lambda: same_logits(transformers_logits(out, bos), reference[0])),
    )
    for name, step in steps:
        if not check(f"{title}: {name}", step):
            break


def train(binary, folder, *options):
    """A few steps on hashed documents; returns the folder of the last checkpoint."""
    documents = [[1] + (hashed.hash64(9, np.arange(i * 70, i * 70 + 60)) % np.uint64(VOCAB - 3) + np.uint64(3)).tolist()
                 for i in range(40)]
    token_file.write_tokens(folder / "train.bin", documents, VOCAB, 1, 2)
    call(binary, "--device", "cpu", "--dtype", "float", "-i", folder / "train.bin", "-o", folder / "run", "-b", 2,
         "--steps", 6, "--lr", "1e-2", *options)
    steps = sorted((folder / "run").glob("step_*"), key=lambda p: int(p.name.split("_")[1]))
    if not steps:
        raise RuntimeError(f"no step_N in {sorted(p.name for p in (folder / 'run').iterdir())}")
    return steps[-1]


def check_trained(binary, folder, title, options, like=None, expected=None):
    """A model that trained here must open in transformers and compute the same; `expected` stands in its config."""
    folder.mkdir()
    state, out = {}, folder / "out"

    def run():
        state["step"] = train(binary, folder, *options)
        return state["step"].name

    def export():
        script("export_hf.py", state["step"], out, "--binary", binary, *(["--like", like] if like else []))
        config = transformers.AutoConfig.from_pretrained(out)
        for name, value in (expected or {}).items():
            found = config.rope_parameters[name] if name == "rope_theta" else getattr(config, name)
            if found != value:
                raise RuntimeError(f"{name} is {found}, expected {value}")

    def compare():
        weights = [f for f in state["step"].iterdir() if f.is_file() and open(f, "rb").read(4) == b"LLAM"]
        return same_logits(program_logits(binary, weights[0], folder, 1), transformers_logits(out, 1))
    for name, step in (("training", run), ("export", export), ("transformers opens it, logits", compare)):
        if not check(f"{title}: {name}", step):
            break


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=os.environ.get("TRAIN_LLAMA", str(ROOT / "train_llama")))
    binary = os.path.abspath(parser.parse_args().binary)
    if not os.access(binary, os.X_OK):
        sys.exit(f"check_hf.py: {binary}: no such program; make train_llama")
    begin = time.time()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        for family, (architecture, fields) in FAMILIES.items():
            for dtype in (torch.float32, torch.bfloat16):
                title = f"{family} {'fp32' if dtype == torch.float32 else 'bf16'}"
                check_round_trip(binary, folder / title, title, architecture, fields, dtype, "300KB")
        for kind, (context, rope) in SCALINGS.items():
            fields = dict(num_key_value_heads=2, max_position_embeddings=context,
                          rope_parameters=dict(rope, rope_type=kind, rope_theta=1e4))
            check_round_trip(binary, folder / kind, f"RoPE {kind}", "LlamaForCausalLM", fields, torch.float32, "5GB")
        check_trained(binary, folder / "scratch", "trained from scratch", ["-e", "tiny", "-c", 128])
        check_trained(binary, folder / "biased", "trained from scratch, tied", ["-e", "tiny", "-c", 128, "--tied"])
        converted = folder / "llama2 fp32" / "model.bin"
        if converted.exists():
            check_trained(binary, folder / "longer", "converted, then trained at 2x the context",
                          ["-e", converted, "-c", 256, "--rope_base", "50000"], like=converted.with_suffix(".hf"),
                          expected={"rope_theta": 50000.0, "max_position_embeddings": 256})
    print(f"{passed} passed, {failed} failed, {time.time() - begin:.0f} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
