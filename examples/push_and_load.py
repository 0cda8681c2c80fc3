"""Give a run's model away, and load it: by timm, by this package, and as the start of another run.

python examples/push_and_load.py RUN_DIR FOLDER
"""

import sys
from pathlib import Path

import timm
import torch

from hpc_supcon.export import load_pushed, push

run, folder = sys.argv[1:]
pushed = push(Path(run), folder, license="apache-2.0", page=False)  # or "hf:OWNER/NAME"
print(*pushed.files, sep="\n")
encoder = load_pushed(folder)
images = torch.randint(0, 256, (4, *encoder.shape), dtype=torch.uint8)
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
mean, std = (torch.tensor(model.pretrained_cfg[name]).view(-1, 1, 1) for name in ("mean", "std"))
pixels = torch.nn.functional.interpolate(images / 255, model.pretrained_cfg["input_size"][1:], mode="bilinear")
print("difference of features:", float((model((pixels - mean) / std) - encoder(images)).abs().max()))
print(f"hpc-supcon run model.encoder={encoder.description['encoder']['name']} model.weights={folder}")
