"""loss.precision: in which format embeddings are multiplied, and that training reaches the kernels of that format."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hpc_supcon import losses
from hpc_supcon.config import load_config
from hpc_supcon.data import ArraySource, Splits
from hpc_supcon.distributed.launch import Launch, Runtime
from hpc_supcon.errors import ConfigError
from hpc_supcon.losses import pairwise
from hpc_supcon.losses.precision import float32_products, tile_precision
from hpc_supcon.training.build import build_training
from hpc_supcon.training.engine import loss_precision
from tests.dist.test_step import in_memory

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_auto_is_bf16_under_autocast_and_for_half_precision_features(dtype):
    features = torch.zeros(2, 3)
    assert tile_precision("auto", features.to(dtype)) == "bf16"
    with torch.autocast("cpu", dtype=dtype):
        assert tile_precision("auto", features) == "bf16"
        assert tile_precision("tf32", features) == "tf32"
    assert tile_precision("auto", features) == "tf32"


@pytest.mark.parametrize(
    ("loss", "training", "expected"),
    [("auto", "bf16", "bf16"), ("auto", "fp16", "bf16"), ("auto", "fp32", "auto"), ("tf32", "bf16", "tf32")],
)
def test_a_loss_follows_the_format_that_training_computes_in(loss, training, expected):
    assert loss_precision(CPU, loss, training) == expected


@pytest.mark.parametrize(("training", "expected"), [("bf16", "bf16"), ("fp32", "auto")])
def test_training_gives_its_losses_the_format_of_the_forward_pass(training, expected):
    config = load_config(
        "default", ["data.batch_size=4", "model.encoder=resnet9_small", f"train.precision={training}"]
    )
    source = ArraySource(torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.arange(8) % 2, ("a", "b"))
    built = build_training(config, in_memory(Splits(source, source, source)), Runtime(Launch(), CPU))
    assert built.state.objective.losses["supcon_out"].precision == expected


def test_fp32_on_cuda_is_computed_by_an_exact_backend_and_refused_by_triton():
    features = SimpleNamespace(is_cuda=True, dtype=torch.float32, shape=(4096, 8))
    anchors = pairwise.Anchors(torch.empty(0, 8), torch.empty(0), [4096], 0)
    assert pairwise.choose_backend("auto", anchors, features, 0.1, "tf32") == "triton"
    assert pairwise.choose_backend("auto", anchors, features, 0.1, "fp32") == "tiled"
    with pytest.raises(ConfigError, match="use precision 'tf32', or backend 'tiled'"):
        pairwise.choose_backend("triton", anchors, features, 0.1, "fp32")


class Products(TorchDispatchMode):
    """Records in which format PyTorch would compute each product of matrices on CUDA."""

    def __init__(self):
        super().__init__()
        self.formats = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.formats.append(torch.get_float32_matmul_precision())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_fp32_products_are_exact_where_the_process_allows_tf32(backend):
    x, labels = torch.randn(9, 4, requires_grad=True), torch.arange(9) % 3
    with float32_products("tf32"):
        for precision, expected in (("fp32", "highest"), ("auto", "high")):
            with Products() as products:
                losses.SupConLoss(0.1, backend=backend, precision=precision)(x, labels).backward()
            assert len(products.formats) >= 2
            assert set(products.formats) == {expected}
        assert torch.get_float32_matmul_precision() == "high"
