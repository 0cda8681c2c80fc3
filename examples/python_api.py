"""An encoder of your own, trained for some seconds, probed and used: python examples/python_api.py RUN_DIR SECONDS"""

import sys
import time

import torch
from torch import nn

import hpc_supcon as hs


class StopAfter(hs.Callback):
    def __init__(self, seconds):
        self.end = time.monotonic() + seconds

    def on_step(self, step, metrics):
        if time.monotonic() > self.end:
            raise hs.StopTraining(f"time is up at loss {metrics['loss']:.3f}")


encoder = nn.Sequential(nn.Conv2d(1, 32, 3, 2, 1), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten())
encoder.feature_dim = 32
settings = {"data.source": "digits", "data.batch_size": 128, "optim.lr": 0.5, "log.every_steps": 1}
run = hs.pretrain(settings, run_dir=sys.argv[1], encoder=encoder, callbacks=[StopAfter(float(sys.argv[2]))])
print(run, hs.probe(run, kind="knn").column("test"), run.embed(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).shape)
