"""3x3 convolutions by Winograd's minimal filtering, for training on processors whose arithmetic is the bottleneck.

F(4x4, 3x3) of Lavin and Gray (arXiv 1509.09308): a tile of 4x4 outputs takes 36 products per pair of channels instead
of 144, for transforms of the tiles whose cost does not grow with the other side's channels. PyTorch does not use it on
a CPU; here all of it is matrix products by BLAS. Both gradients go the same way backwards, as the exact adjoints of
the forward pass. Errors stay below 1e-5 of the largest value, a few times a direct convolution's.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

TILE = 4
CHANNELS = {"AVX2": 128, "AVX512": 256}
"""By instruction set: fewer channels, in or out, are left to the direct convolution; transforms would cost too much.

Measured on AMD processors, with AVX-512 on Zen 4.
"""

_WORKSPACE = 20 << 20  # bytes of transformed input at a time: what stays in a shared cache is written and read faster


class WinogradConv2d(nn.Conv2d):
    """A 3x3 convolution of stride 1 that, when training in float32 on a CPU, goes by Winograd's way."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        trains = torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        if x.device.type != "cpu" or x.dtype != torch.float32 or not trains:
            direct: Tensor = super()._conv_forward(x, weight, bias)
            return direct
        sizes = int(self.padding[0]), self.dilation[0]
        result: Tensor = _Winograd.apply(x, weight, bias, *sizes)  # type: ignore[no-untyped-call]
        return result


def use_winograd(module: nn.Module, channels: int | None = None) -> None:
    """Make every convolution in `module` that gains from it a `WinogradConv2d`, in place; its parameters stay.

    channels: from how many, in and out; by default what `CHANNELS` has for this processor, or else nothing is changed.
    """
    if channels is None:
        channels = CHANNELS.get(torch.backends.cpu.get_cpu_capability())
    if channels is None:
        return
    for layer in module.modules():
        if type(layer) is nn.Conv2d and _suits(layer, channels):
            layer.__class__ = WinogradConv2d


def _suits(conv: nn.Conv2d, channels: int) -> bool:
    square = conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.dilation[0] == conv.dilation[1]
    zeros = conv.padding_mode == "zeros" and conv.padding in ((0, 0), (1, 1), (2, 2))
    return square and zeros and conv.groups == 1 and min(conv.in_channels, conv.out_channels) >= channels


_recomputing = False


@contextlib.contextmanager
def recomputing() -> Iterator[None]:
    """Within: only what convolutions save for the backward pass is asked for, not their results."""
    global _recomputing
    before, _recomputing = _recomputing, True
    try:
        yield
    finally:
        _recomputing = before


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, dilation: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.plan = plan = _Plan(x.shape, weight.shape, padding, dilation)
        result = x.new_empty(plan.batch, plan.outputs, plan.height, plan.width)
        if _recomputing:
            return result
        filters = plan.filters(weight).transpose(1, 2)
        for images in plan.chunks():
            inputs = plan.input_tiles(x[images])
            outputs = _scratch("outputs", len(inputs), 36, plan.outputs)
            torch.bmm(inputs.transpose(0, 1), filters, out=outputs.transpose(0, 1))
            plan.to_pictures(outputs, result[images])
        return result if bias is None else result.add_(bias.view(-1, 1, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        plan: _Plan = ctx.plan
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        chunks, outputs = list(plan.chunks()), None
        weight_gradient = x_gradient = None
        if of_weight:
            products = _scratch("matrices", 36, plan.outputs, plan.inputs)
            for images in chunks:
                outputs = plan.output_tiles(gradient[images])
                turned, inputs = outputs.permute(1, 2, 0), plan.input_tiles(x[images]).transpose(0, 1)
                torch.baddbmm(products, turned, inputs, beta=float(images.start > 0), out=products)
            weight_gradient = plan.weight_gradient(products)
        if of_x:  # after the weight's: both take memory for 36 matrices, the same
            filters = plan.filters(weight)
            x_gradient = torch.empty_like(x, memory_format=torch.contiguous_format)
            for images in chunks:
                if outputs is None or len(chunks) > 1:
                    outputs = plan.output_tiles(gradient[images])
                inputs = _scratch("inputs", len(outputs), 36, plan.inputs)
                torch.bmm(outputs.transpose(0, 1), filters, out=inputs.transpose(0, 1))
                plan.to_input_pictures(inputs, x_gradient[images])
        return x_gradient, weight_gradient, gradient.sum(dim=(0, 2, 3)) if of_bias else None, None, None


# The matrices of F(4, 3) with the points 0, 1, -1, 2, -2 (Lavin and Gray, section 4.3): inputs, filters, outputs.
_INPUT = torch.tensor(
    [
        [4.0, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_FILTER = torch.tensor([[6.0, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
_OUTPUT = torch.tensor([[1.0, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])
# Rows and columns in one product: a tile's 36 (or 9, or 16) numbers are a vector.
_INPUT, _FILTER, _OUTPUT = (torch.kron(matrix, matrix) for matrix in (_INPUT, _FILTER, _OUTPUT))


class _Plan:
    """The sizes of one convolution, and the transforms between pictures N,C,H,W and tiles P,36,C.

    P counts the tiles of 4x4 outputs of all pictures. A dilated convolution is one of dilation 1 on every dilation-th
    row and column: in between, pixels are laid out as N, row, phase, column, phase, channel.
    """

    def __init__(self, x: Sequence[int], weight: Sequence[int], padding: int, dilation: int) -> None:
        self.batch, self.inputs, *size = x
        self.outputs, self.padding, self.dilation = weight[0], padding, dilation
        self.height, self.width = (side + 2 * padding - 2 * dilation for side in size)
        self.down, self.across = (-(-side // (TILE * dilation)) for side in (self.height, self.width))
        self.known = [slice(padding, padding + side) for side in size]
        self.rows, self.columns = TILE * self.down + 2, TILE * self.across + 2
        # Whether tiles cover outputs and padded inputs exactly: else zeros fill them up.
        whole = TILE * dilation * self.down, TILE * dilation * self.across
        self.exact = whole == (self.height, self.width)

    def chunks(self) -> Iterator[slice]:
        """Yield slices of the batch whose transformed inputs fit the workspace."""
        image = 36 * 4 * self.dilation**2 * self.down * self.across * max(self.inputs, self.outputs)
        size = max(1, _WORKSPACE // image)
        for start in range(0, self.batch, size):
            yield slice(start, min(start + size, self.batch))

    def filters(self, weight: Tensor) -> Tensor:
        """Return G g G^T, 36,K,C, of weights K,C,3,3."""
        result = _scratch("matrices", 36, self.outputs, self.inputs)
        torch.mm(_FILTER, weight.detach().reshape(-1, 9).T, out=result.view(36, -1))
        return result

    def weight_gradient(self, products: Tensor) -> Tensor:
        """Return K,C,3,3 of 36,K,C: the adjoint of `filters`."""
        return (_FILTER.T @ products.view(36, -1)).T.reshape(self.outputs, self.inputs, 3, 3)

    def input_tiles(self, x: Tensor) -> Tensor:
        """Return B^T d B of every 6x6 patch d of the padded pictures, P,36,C."""
        d = self.dilation
        laid = _scratch("laid", len(x), self.rows * d, self.columns * d, self.inputs)
        if self.padding or not self.exact:
            laid.zero_()
        laid[:, self.known[0], self.known[1]] = x.permute(0, 2, 3, 1)
        patches = self._phases(laid, self.rows, self.columns).unfold(3, 6, TILE).unfold(4, 6, TILE)
        return _for_each(_INPUT, patches.permute(0, 1, 2, 3, 4, 6, 7, 5), "inputs")

    def to_input_pictures(self, tiles: Tensor, pictures: Tensor) -> None:
        """Write n,C,H,W of P,36,C: the adjoint of `input_tiles`; patches that overlap add up."""
        n, d = len(pictures), self.dilation
        patches = _for_each(_INPUT.T, tiles, "patches").view(n, d, d, self.down, self.across, 6, 6, self.inputs)
        laid = _scratch("laid", n, self.rows * d, self.columns * d, self.inputs).zero_()
        phases = self._phases(laid, self.rows, self.columns)
        for i in range(6):
            for j in range(6):
                phases[:, :, :, i : i + self.rows - 5 : TILE, j : j + self.columns - 5 : TILE] += patches[..., i, j, :]
        pictures.copy_(laid[:, self.known[0], self.known[1]].permute(0, 3, 1, 2))

    def to_pictures(self, tiles: Tensor, pictures: Tensor) -> None:
        """Write A^T m A of every product m: n,K,H',W' of P,36,K."""
        n, d = len(pictures), self.dilation
        outputs = _for_each(_OUTPUT, tiles, "patches").view(n, d, d, self.down, self.across, TILE, TILE, self.outputs)
        laid = self._outputs_laid(n)
        laid.view(self._tiled(n)).copy_(outputs.permute(0, 3, 5, 1, 4, 6, 2, 7))
        pictures.copy_(laid[:, : self.height, : self.width].permute(0, 3, 1, 2))

    def output_tiles(self, gradient: Tensor) -> Tensor:
        """Return P,36,K of n,K,H',W': the adjoint of `to_pictures`."""
        n = len(gradient)
        laid = self._outputs_laid(n)
        if not self.exact:
            laid.zero_()
        laid[:, : self.height, : self.width] = gradient.permute(0, 2, 3, 1)
        pixels = laid.view(self._tiled(n)).permute(0, 3, 6, 1, 4, 2, 5, 7)
        return _for_each(_OUTPUT.T, pixels, "outputs")

    def _outputs_laid(self, n: int) -> Tensor:
        d = self.dilation
        return _scratch("laid", n, TILE * d * self.down, TILE * d * self.across, self.outputs)

    def _tiled(self, n: int) -> tuple[int, ...]:
        """Return the shape in which n pictures' rows are (tile, row of the tile, phase), columns alike."""
        d = self.dilation
        return n, self.down, TILE, d, self.across, TILE, d, self.outputs

    def _phases(self, laid: Tensor, rows: int, columns: int) -> Tensor:
        """Return n, phase, phase, row, column, channel of n, row x phase, column x phase, channel."""
        d = self.dilation
        return laid.view(len(laid), rows, d, columns, d, -1).permute(0, 2, 4, 1, 3, 5)


def _for_each(matrix: Tensor, tiles: Tensor, name: str) -> Tensor:
    """Return matrix @ tile for every tile, in scratch memory: small products, one after the other in cache.

    tiles: P,n,C, or with P and n spread over several dimensions, in any strides.
    """
    size, channels = matrix.shape[1], tiles.shape[-1]
    if tiles.ndim > 3:
        tiles = _scratch("patches", *tiles.shape).copy_(tiles).view(-1, size, channels)
    result = _scratch(name, len(tiles), matrix.shape[0], channels)
    return torch.bmm(matrix.expand(len(tiles), -1, -1), tiles, out=result)


_kept = threading.local()


def _scratch(name: str, *shape: int) -> Tensor:
    """Return float32 memory of that name, one per thread, with whatever is in it.

    Fresh memory for every tile of every convolution would cost as much time as the products: the system clears it.
    """
    size = math.prod(shape)
    memory: Tensor | None = getattr(_kept, name, None)
    if memory is None or len(memory) < size:
        memory = torch.empty(size)
        setattr(_kept, name, memory)
    return memory[:size].view(shape)


def release_scratch() -> None:
    """Give this thread's scratch memory back."""
    _kept.__dict__.clear()
