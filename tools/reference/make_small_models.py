"""Makes the small random models of tests/models: seeded Qwen2 and Llama, bf16, with the demo model's byte tokenizer.

    python3 make_small_models.py [--out ../../tests/models]

Together they cover head widths 32, 64 and 128, 1, 2 and 7 query heads per key/value head, tied and untied heads, llama3 rope scaling, one and
several weight files, and both spellings of the rope settings. Weights are scaled so that logits spread and attention is not uniform.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo_model"))

import folder  # noqa: E402

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

# `rope`: "old" writes rope_theta and rope_scaling, "new" writes rope_parameters.
MODELS = {
    "qwen2-w64-r2": dict(kind="qwen2", hidden=128, heads=2, kv_heads=1, width=64, ffn=96, layers=3, vocabulary=512, tied=True,
                         theta=10000.0, scaling=None, rope="old", files=1),
    "qwen2-w32-r7": dict(kind="qwen2", hidden=224, heads=7, kv_heads=1, width=32, ffn=80, layers=2, vocabulary=512, tied=True,
                         theta=1000000.0, scaling=None, rope="new", files=1),
    "qwen2-w128-r1": dict(kind="qwen2", hidden=128, heads=1, kv_heads=1, width=128, ffn=112, layers=2, vocabulary=1008, tied=False,
                          theta=10000.0, scaling=None, rope="old", files=1),
    "llama-w64-r1": dict(kind="llama", hidden=128, heads=2, kv_heads=2, width=64, ffn=96, layers=2, vocabulary=512, tied=True,
                         theta=10000.0, scaling=None, rope="old", files=2),
    "llama-w128-r2": dict(kind="llama", hidden=128, heads=2, kv_heads=1, width=128, ffn=96, layers=2, vocabulary=512, tied=False,
                          theta=500000.0, scaling=LLAMA3, rope="old", files=1),
    "llama-w32-r7": dict(kind="llama", hidden=112, heads=7, kv_heads=1, width=32, ffn=96, layers=2, vocabulary=528, tied=False,
                         theta=10000.0, scaling=LLAMA3, rope="new", files=3),
}


def random_weights(shape, seed, spread):
    """Hugging Face names -> bf16 tensors. `spread`: standard deviation of the logits, roughly; bf16 activations move a logit by about 1 % of it."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, scale, around=0.0):
        return (around + scale * torch.randn(*size, generator=generator)).bfloat16()

    hidden, queries, keys = shape["hidden"], shape["heads"] * shape["width"], shape["kv_heads"] * shape["width"]
    layers, ffn = shape["layers"], shape["ffn"]
    # Each block adds to the residual stream; together they should outweigh the embedding by a few times, at any depth.
    block = 1.0 / math.sqrt(layers)
    weights = {"model.embed_tokens.weight": normal(shape["vocabulary"], hidden, scale=spread / math.sqrt(hidden))}
    for index in range(layers):
        name = f"model.layers.{index}."
        weights[name + "input_layernorm.weight"] = normal(hidden, scale=0.2, around=1.0)
        for part, rows, scale in (("q", queries, 1.2), ("k", keys, 1.2), ("v", keys, 1.0)):
            weights[f"{name}self_attn.{part}_proj.weight"] = normal(rows, hidden, scale=scale / math.sqrt(hidden))
            if shape["kind"] == "qwen2":
                weights[f"{name}self_attn.{part}_proj.bias"] = normal(rows, scale=0.3)
        weights[name + "self_attn.o_proj.weight"] = normal(hidden, queries, scale=block / math.sqrt(queries))
        weights[name + "post_attention_layernorm.weight"] = normal(hidden, scale=0.2, around=1.0)
        weights[name + "mlp.gate_proj.weight"] = normal(ffn, hidden, scale=1.0 / math.sqrt(hidden))
        weights[name + "mlp.up_proj.weight"] = normal(ffn, hidden, scale=1.0 / math.sqrt(hidden))
        weights[name + "mlp.down_proj.weight"] = normal(hidden, ffn, scale=block / math.sqrt(ffn))
    weights["model.norm.weight"] = normal(hidden, scale=0.2, around=1.0)
    if not shape["tied"]:
        weights["lm_head.weight"] = normal(shape["vocabulary"], hidden, scale=spread / math.sqrt(hidden))
    return weights


def config(shape, positions=2048):
    settings = {
        "architectures": [{"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[shape["kind"]]],
        "model_type": shape["kind"],
        "vocab_size": shape["vocabulary"],
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["ffn"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "hidden_act": "silu",
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-6 if shape["kind"] == "qwen2" else 1e-5,
        "tie_word_embeddings": shape["tied"],
        "bos_token_id": None,
        "eos_token_id": 258,
        "pad_token_id": 256,
    }
    if shape["heads"] * shape["width"] != shape["hidden"]:
        settings["head_dim"] = shape["width"]
    if shape["kind"] == "llama":
        settings |= {"attention_bias": False, "mlp_bias": False}
    else:
        settings |= {"use_sliding_window": False}
    if shape["rope"] == "old":
        settings |= {"rope_theta": shape["theta"], "torch_dtype": "bfloat16"}
        if shape["scaling"]:
            settings["rope_scaling"] = shape["scaling"]
    else:
        settings |= {"rope_parameters": {"rope_type": "default", **(shape["scaling"] or {}), "rope_theta": shape["theta"]}, "dtype": "bfloat16"}
    return settings


def write_weights(target, weights, files):
    if files == 1:
        save(target / "model.safetensors", weights)
        return
    names, total, index = list(weights), sum(t.numel() * 2 for t in weights.values()), {}
    share = -(-len(names) // files)
    for number in range(files):
        mine = names[number * share:(number + 1) * share]
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        save(target / file, {name: weights[name] for name in mine})
        index |= dict.fromkeys(mine, file)
    folder.dump(target / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def save(path, weights):
    save_file(weights, str(path), metadata={"format": "pt"})
    path.chmod(0o644)


def write_model(target, shape, seed, spread=1.0, positions=2048):
    target.mkdir(parents=True, exist_ok=True)
    folder.write_tokenizer(target, positions)
    folder.dump(target / "config.json", config(shape, positions))
    folder.dump(target / "generation_config.json", {"do_sample": False, "eos_token_id": [258, 256], "pad_token_id": 256})
    write_weights(target, random_weights(shape, seed, spread), shape["files"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[2] / "tests" / "models")
    args = parser.parse_args()
    for seed, (name, shape) in enumerate(MODELS.items(), 100):
        write_model(args.out / name, shape, seed)
        size = sum(path.stat().st_size for path in (args.out / name).iterdir())
        print(f"{name}: {size / 1e3:.0f} kB  {json.dumps(shape)}")


if __name__ == "__main__":
    main()
