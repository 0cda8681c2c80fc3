"""Images of five bands and 12 bits, such as a satellite's, in .npy files: python examples/many_channels.py FOLDER"""

import sys
from pathlib import Path

import numpy as np

from hpc_supcon import cli

if __name__ == "__main__":
    folder, rng = Path(sys.argv[1]), np.random.default_rng(0)
    for split, count in (("train", 60), ("test", 20)):
        for name, near_infrared in (("forest", 1.0), ("water", 0.2)):
            (folder / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 4096, (5, 16, 16), dtype=np.uint16)
                image[3] = image[3] * near_infrared
                np.save(folder / "images" / split / name / f"{i:02}.npy", image)
    settings = ["data.source=image_folder", f"data.root={folder / 'images'}", "data.channels=5", "data.batch_size=32"]
    settings += ["model.encoder=conv", "train.epochs=2", "probe.kind=knn", "report.embeddings=false"]
    cli.main(["run", *settings, f"run_dir={folder / 'run'}"])
