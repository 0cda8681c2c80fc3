"""Adapt a Vision Transformer to images by low-rank adapters; its own weights stay as they are.

    pip install 'hpc-supcon[lora]'
    python examples/lora.py RUN_DIR hf:timm/vit_small_patch16_224.augreg_in21k model.encoder=vit_small_patch16_224 \
        model.input_size=224 data.channels=3 train.epochs=20

Without a name on the Hugging Face Hub (or a folder that `hpc-supcon push` wrote) the weights are random.
"""

import sys

from hpc_supcon.cli import main

run_dir, weights, *more = [*sys.argv[1:], "null"]
settings = [
    "data.source=digits", "model.encoder=test_vit", "model.input_size=32", "optim.name=adamw", "optim.lr=0.001",
    "model.lora={rank: 8, targets: [qkv, proj]}", "train.epochs=2", "probe.kind=[linear, knn]",
    f"model.weights={weights}", f"run_dir={run_dir}",
]  # fmt: skip
main(["run", "default", *settings, *(text for text in more if "=" in text)])
