"""Write tars of WebDataset, here of scikit-learn's digits, and train on them.

python to_webdataset.py
hpc-supcon run quickstart data.source=webdataset data.root=digits-tars/{train-{0..3},test-0}.tar

Ranks share all tars, so that their number and sizes do not matter; an epoch serves every sample once.
"""

from pathlib import Path

import webdataset
from PIL import Image
from sklearn.datasets import load_digits

digits = load_digits()
Path("digits-tars").mkdir(exist_ok=True)
for shard, first in {"train-0": 0, "train-1": 400, "train-2": 800, "train-3": 1200, "test-0": 1400}.items():
    with webdataset.TarWriter(f"digits-tars/{shard}.tar") as tar:
        for i in range(first, min(first + 400, 1400) if "train" in shard else len(digits.images)):
            image = Image.fromarray((digits.images[i] * 15).astype("uint8"))
            tar.write({"__key__": f"{i:06d}", "png": image, "cls": int(digits.target[i])})
