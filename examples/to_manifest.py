"""Write a table of paths and labels, here of scikit-learn's digits, and train on the images that it names.

python to_manifest.py
hpc-supcon run quickstart data.source=manifest data.root=digits.csv data.columns.label=digit

A .parquet is read as a .csv is; paths are relative to the table, or to data.image_root.
"""

import csv
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

digits = load_digits()
Path("digits-files").mkdir(exist_ok=True)
with Path("digits.csv").open("w", newline="") as file:
    table = csv.writer(file)
    table.writerow(["path", "digit", "split"])
    for i, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        Image.fromarray((pixels * 15).astype("uint8")).save(f"digits-files/{i}.png")
        table.writerow([f"digits-files/{i}.png", digit, "test" if i % 5 == 0 else "train"])
