"""Writes the model as an ordinary Hugging Face folder: byte tokenizer, ChatML template, Qwen2 config, bf16 safetensors."""

import json
from pathlib import Path

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_letters():
    """The printable character that byte-level BPE writes for each byte, as in GPT-2's vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in shown}
    for offset, byte in enumerate(byte for byte in range(256) if byte not in letters):
        letters[byte] = chr(256 + offset)
    return [letters[byte] for byte in range(256)]


def dump(path, value):
    Path(path).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(folder, model_max_length=2048):
    """Token id = byte value; then the special tokens. No merges, so no text is out of vocabulary."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    special = [
        {"id": 256 + i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for i, text in enumerate(SPECIAL)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    dump(folder / "tokenizer.json", {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {letter: byte for byte, letter in enumerate(byte_letters())}, "merges": [],
        },
    })
    dump(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(token["id"]): {key: token[key] for key in token if key != "id"} for token in special},
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
        "chat_template": CHAT_TEMPLATE,
    })


def write_config(folder, shape):
    """`shape` is network.Shape; the spelling is the older one, which every reader knows."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dump(folder / "config.json", {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.width,
        "hidden_act": "silu",
        "max_position_embeddings": shape.positions,
        "rope_theta": shape.theta,
        "rms_norm_eps": shape.epsilon,
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "use_cache": True,
        "initializer_range": 0.02,
        "bos_token_id": None,
        "eos_token_id": 258,
        "pad_token_id": 256,
        "torch_dtype": "bfloat16",
    })
    dump(folder / "generation_config.json", {"do_sample": False, "eos_token_id": [258, 256], "pad_token_id": 256})


def write_folder(folder, network):
    """The whole folder, weights rounded from float32 to bf16."""
    import torch
    from safetensors.torch import save_file

    write_tokenizer(folder, network.shape.positions)
    write_config(folder, network.shape)
    weights = {name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in network.named_weights()}
    path = Path(folder) / "model.safetensors"
    save_file(weights, str(path), metadata={"format": "pt"})
    path.chmod(0o644)
