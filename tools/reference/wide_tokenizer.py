"""Gives a model folder a tokenizer of its vocabulary's size, so that it can be served: the demo model's, filled up with names.

    tools/reference/wide_tokenizer.py FOLDER

For models with random weights: which text a token stands for does not matter, only that each has one."""

import argparse
import json
import pathlib
import shutil

DEMO = pathlib.Path(__file__).resolve().parents[2] / "models" / "demo"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    folder = parser.parse_args().folder
    wanted = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    taken = set(vocab.values()) | {token["id"] for token in tokenizer["added_tokens"]}
    vocab.update({f"w{number}": number for number in range(wanted) if number not in taken})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copy(DEMO / "tokenizer_config.json", folder)


if __name__ == "__main__":
    main()
