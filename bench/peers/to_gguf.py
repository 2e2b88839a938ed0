#!/usr/bin/env python3
"""A checkpoint folder without a tokenizer to a BF16 GGUF file, with llama.cpp's own converter."""

import sys
from pathlib import Path


def main() -> None:
    llama_cpp, folder, out = (Path(a) for a in sys.argv[1:4])
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    import gguf
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    architecture = get_model_architecture(ModelBase.load_hparams(folder, False), ModelType.TEXT)
    model_class = get_model_class(architecture)
    # random weights have no vocabulary to convert; the benchmark feeds ids
    model_class.set_vocab = model_class._set_vocab_none
    with torch.inference_mode():
        model_class(folder, gguf.LlamaFileType.MOSTLY_BF16, out).write()


if __name__ == "__main__":
    main()
