"""Blocks to encode, and a cache's pages to write them into."""

from collections.abc import Callable

import torch
from kvcluster_kernels.encode_blocks import Blocks, store_blocks
from torch import Tensor

from kvcluster.codec.array import ArrayCodec, BlockShape, consecutive

_PAGE_BLOCKS = 4


def drawn_blocks(
    shape: BlockShape, device: torch.device, *, dtype: torch.dtype = torch.float32
) -> Blocks:
    """Three blocks of a longer row: of ordinary numbers, of large ones with some beyond float16,
    and of few different ones, among them a channel and a token of zeros."""
    generator = torch.Generator().manual_seed(0)
    num_heads, num_tokens, dim = shape
    x_KTD = torch.randn(num_heads, 3 * num_tokens, dim, generator=generator)
    x_KTD = x_KTD * torch.linspace(0.1, 2, dim) + torch.linspace(-3, 1, dim)
    middle = slice(num_tokens, 2 * num_tokens)
    x_KTD[:, middle] *= 10 ** torch.linspace(-8, 4, dim)
    x_KTD[0, num_tokens, :2] = torch.tensor([1e6, -1e6])
    x_KTD[:, 2 * num_tokens :] = x_KTD[:, 2 * num_tokens :].round()
    x_KTD[:, 2 * num_tokens :, 1] = 0
    x_KTD[:, -1] = 0
    x_BKSD = x_KTD.to(dtype).to(device).unflatten(1, (3, num_tokens)).transpose(0, 1)
    return Blocks(x_BKSD, torch.tensor([5, 0, 10], dtype=torch.int32, device=device))


def empty_planes(codec: ArrayCodec, shape: BlockShape, device: torch.device) -> list[Tensor]:
    """Planes `[pages, blocks, ...]` as in the cache: a page has more beside each. Nothing that is
    not written may change, so all bytes are of one value."""
    planes = []
    for plane in codec.planes(shape):
        size = plane.num_bytes * _PAGE_BLOCKS
        pages = torch.full((3, size + 64), 0xA5, dtype=torch.uint8, device=device)
        in_pages = pages[:, :size].view(plane.dtype)
        planes.append(in_pages.unflatten(1, (_PAGE_BLOCKS, *plane.shape)))
    return planes


def assert_bytes_of_codec(
    codec: ArrayCodec,
    blocks: Blocks,
    encode: Callable[[Blocks, tuple[Tensor, ...]], None],
    *,
    definition_on: torch.device | None = None,
) -> None:
    """`encode(blocks, planes)` writes what the codec gives, to the byte, and nothing else."""
    shape = BlockShape(*blocks.x_BKSD.shape[1:])
    device = blocks.x_BKSD.device
    planes, want = (empty_planes(codec, shape, device) for _ in range(2))
    x_BKSD = blocks.x_BKSD.to(definition_on or device)
    starts_B = torch.arange(len(x_BKSD), device=x_BKSD.device)
    encoded = codec.encode(x_BKSD, consecutive(starts_B, shape.num_tokens))
    store_blocks(want, blocks.block_ids_B, [plane.to(device) for plane in encoded])

    encode(blocks, tuple(planes))

    for name, found, wanted in zip(codec.planes(shape), planes, want, strict=True):
        assert_equal_bytes(name.name, found, wanted)


def assert_equal_bytes(name: str, found: Tensor, wanted: Tensor) -> None:
    differing = _bytes(found) != _bytes(wanted)
    assert not differing.any(), f"{int(differing.sum())} of {differing.numel()} bytes of {name}"


def _bytes(plane: Tensor) -> Tensor:
    return plane.contiguous().view(torch.uint8)
