"""Save a Hugging Face DatasetDict, here scikit-learn's digits, and train on it.

python to_huggingface.py
hpc-supcon run quickstart data.source=huggingface data.root=digits-saved

A data set of the hub needs no saving: data.source=huggingface data.root=hf:ylecun/mnist
"""

import datasets
from PIL import Image
from sklearn.datasets import load_digits

digits = load_digits()
found = datasets.Dataset.from_dict(
    {"image": [Image.fromarray((x * 15).astype("uint8")) for x in digits.images], "label": digits.target},
    datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(10)}),
)
found.train_test_split(test_size=0.2, seed=0).save_to_disk("digits-saved")
