"""BatchNorm with statistics over all ranks: PyTorch's on CUDA, and one for the CPU and for compiled models.

With small batches per rank, per-rank statistics reveal which images share a rank (google-research/simclr issue 114).
PyTorch's SyncBatchNorm supports CUDA only, and torch.compile does not trace it: the graph of a model breaks in every
layer. The one of this module is traced: its sums over ranks become nodes of the graph.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from timm.layers.norm_act import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn


@torch.library.custom_op("hpc_supcon::sum_over_ranks", mutates_args=())
def _traced_sum(values: Tensor) -> Tensor:
    """One node of a compiled graph. PyTorch's own all-reduce becomes two, one of which changes a buffer in place:
    inductor of PyTorch 2.14 uses such a buffer for other values as well, which gave wrong statistics."""
    total = values.clone()
    dist.all_reduce(total)
    return total


@_traced_sum.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty_like(values)


def _sum_over_ranks(values: Tensor) -> Tensor:
    """May change `values`."""
    if torch.compiler.is_compiling():
        return _traced_sum(values)
    dist.all_reduce(values)
    return values


class _GlobalBatchNorm(torch.autograd.Function):
    """Batch normalization (Ioffe & Szegedy 2015) with statistics over all ranks, exact for unequal batches.

    Two small all-reduces: of 2 C + 1 numbers in the forward pass and of 2 C in the backward pass. The activations
    are processed by PyTorch's fused kernels.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Any:
        axes = [d for d in range(x.dim()) if d != 1]
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        var, mean = torch.var_mean(x.to(wide), dim=axes, correction=0)
        n = torch.full((1,), x.numel() // x.shape[1], dtype=torch.float64, device=x.device)
        # in float64, so that the difference of squares below loses no precision of fp32
        mean, var = mean.double(), var.double()
        message = torch.cat([n, mean * n, (var + mean * mean) * n])
        message = _sum_over_ranks(message)
        count, total, squares = message.split([1, mean.numel(), mean.numel()])
        mean = total / count
        var = (squares / count - mean * mean).clamp_(min=0).to(wide)
        mean = mean.to(wide)
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps = eps
        y = torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False)
        ctx.mark_non_differentiable(mean, var, count)
        return y, mean, var, count

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, mean, var, count = ctx.saved_tensors
        dy = grads[0]
        invstd = torch.rsqrt(var + ctx.eps)
        # With fixed statistics, d_weight = sum dy xhat and d_bias = sum dy over this rank's values.
        _, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, mean, var, None, None, False, ctx.eps, [False, True, True]
        )
        sums = torch.cat([d_weight, d_bias])
        sums = _sum_over_ranks(sums)
        xhat_sum, dy_sum = (sums / count.to(sums.dtype)).chunk(2)
        # dx = (dy - mean dy - xhat mean(dy xhat)) invstd weight, as one affine map of dy and x per channel
        shape = [1, -1] + [1] * (x.dim() - 2)
        scale = (weight * invstd).view(shape)
        slope = (weight * invstd * invstd * xhat_sum).view(shape)
        offset = (weight * invstd * (xhat_sum * mean * invstd - dy_sum)).view(shape)
        dx = torch.addcmul(offset - slope * x, dy, scale).to(x.dtype)
        return dx, d_weight, d_bias, None


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """SyncBatchNorm for any device, which torch.compile traces. In evaluation mode it is BatchNorm.

    In training, every rank must have at least one row.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least [N, C], got {list(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        weight, bias = self.weight, self.bias
        if weight is None or bias is None:  # affine=False
            weight, bias = input.new_ones(input.shape[1]), input.new_zeros(input.shape[1])
        y, mean, var, count = _GlobalBatchNorm.apply(input, weight, bias, self.eps)
        if not self.track_running_stats:
            return y
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                momentum: float | Tensor | None = self.momentum
                if momentum is None:
                    momentum = self.num_batches_tracked.to(self.running_mean.dtype).reciprocal()
                unbiased = var * (count / (count - 1).clamp(min=1)).to(var.dtype)
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        return y


class GlobalBatchNormAct(GlobalBatchNorm):
    """The same for timm's BatchNormAct2d, which includes its activation function (DenseNet, Inception)."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


def synchronize_batchnorm(module: nn.Module, device: torch.device, *, compiled: bool = False) -> nn.Module:
    """`module` with every BatchNorm replaced by one over all ranks. Parameters, buffers and names stay the same.

    compiled: the module will be compiled. Does nothing to a module that it has made already.
    """
    if device.type == "cuda" and not compiled:
        if any(isinstance(part, GlobalBatchNorm) for part in module.modules()):
            return module
        return convert_sync_batchnorm(module)  # timm's: PyTorch's drops the activation inside BatchNormAct2d
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        # Changing the class of the object keeps its parameters, buffers and hooks.
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            module.__class__ = GlobalBatchNorm
        elif type(module) is BatchNormAct2d:
            module.__class__ = GlobalBatchNormAct  # type: ignore[assignment]
        return module
    for child in module.children():
        synchronize_batchnorm(child, device, compiled=compiled)
    return module
