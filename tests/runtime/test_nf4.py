"""Bytes, scales and values of 4-bit weights equal those of bitsandbytes' CPU backend."""

import hashlib
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from runtime import nf4, nf4_cpu
from runtime.nf4_tables import thresholds

SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def gaussian(size: int) -> Tensor:
    return torch.randn(3, 2 * size + 7, generator=torch.Generator().manual_seed(size)) * 0.02


def ties(size: int) -> Tensor:
    """Every midpoint times a block's scale, and its two neighbours above and below, under several scales."""
    rows = []
    for kind, scale in itertools.product(nf4.KINDS, (1.0, 0.3, 2.0**-9, 7e3)):
        exact = torch.tensor(thresholds(kind)[0]) * scale
        up, down = exact.nextafter(torch.tensor(math.inf)), exact.nextafter(torch.tensor(-math.inf))
        rows.append(torch.cat([exact, up, down, torch.tensor([scale, -0.0, 0.0])]))
    blocks = torch.stack(rows)
    return torch.nn.functional.pad(blocks, (0, -blocks.shape[1] % size)).reshape(-1)


def extremes(size: int) -> Tensor:
    """Blocks of zeros, denormals, the smallest and largest numbers; then an incomplete block of zeros."""
    noise = torch.randn(8, size, generator=torch.Generator().manual_seed(size + 1)).clamp(-3, 3)
    scales = torch.tensor([0.0, 1e-45, 3e-41, 9e-39, 2e-38, 6e-8, 2e4, 1e38])
    return torch.cat([(noise * scales[:, None]).reshape(-1), -torch.zeros(size // 2 + 1)])


def uneven(size: int) -> Tensor:
    """Most blocks alike, a few far larger; one incomplete block of an odd number of weights."""
    noise = torch.rand(5 * size + 13, generator=torch.Generator().manual_seed(size + 2)) - 0.4
    noise[size : size + 9] *= 500
    return noise


@pytest.fixture(scope="module")
def library():
    """bitsandbytes, whose generic functions torch.compile would otherwise build in C++ for minutes."""
    functional = pytest.importorskip("bitsandbytes.functional")
    with torch.compiler.set_stance("force_eager"):
        yield functional


def same(one: Tensor, other: Tensor) -> bool:
    """Of one type and bit for bit equal, -0 and 0 told apart."""
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and torch.equal(*bits)


def equal(one: Tensor, other: Tensor) -> bool:
    """Of one type and equal; FP4's second zero is -0 to some of bitsandbytes' own kernels and 0 to others."""
    return one.dtype == other.dtype and torch.equal(one.reshape(-1), other.reshape(-1))


def compare(library, weight: Tensor, size: int, kind: str, double: bool) -> None:
    packed, state = library.quantize_4bit(weight, blocksize=size, quant_type=kind, compress_statistics=double)
    it = nf4.quantize(weight, block_size=size, kind=kind, double_quantise=double)
    assert same(it.packed, packed)
    assert same(it.absmax, state.absmax)
    assert (it.shape, it.dtype, it.block_size, it.kind) == (tuple(weight.shape), weight.dtype, size, kind)
    if double:
        assert it.nested is not None
        assert same(it.nested.absmax, state.state2.absmax)
        assert same(it.nested.offset, state.offset)
        assert it.nested.block_size == state.state2.blocksize
        assert same(nf4.NESTED_CODE, state.state2.code)
    if packed.shape[0] > 1:  # bitsandbytes transposes what it reads from a single byte
        state.shape = torch.Size(
            [weight.numel()]
        )  # bitsandbytes' CPU kernel mistakes scales of rows with broken blocks
        read = library.dequantize_4bit(packed, state)
        assert equal(nf4.dequantize(it), read)
        flat = nf4.dequantize_flat(
            it.packed, it.scales(), numel=weight.numel(), block_size=size, kind=kind, dtype=it.dtype
        )
        assert equal(flat, read)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", nf4.KINDS)
@pytest.mark.parametrize("make", [gaussian, ties, extremes, uneven], ids=lambda make: make.__name__)
def test_bytes_scales_and_values_equal_bitsandbytes(library, make, kind, size):
    weight = make(size)
    for dtype, double in itertools.product(TYPES, (False, True)):
        cast = weight.to(dtype)
        compare(library, cast.nan_to_num(posinf=1.0, neginf=-1.0), size, kind, double)  # fp16 ends at 65504


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_weight_has_the_bytes_of_bitsandbytes(library, data):
    shape = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    seed = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 10.0 ** data.draw(st.integers(-44, 30))
    weight = weight * (torch.rand(shape, generator=generator) >= data.draw(st.sampled_from([0.0, 0.5, 0.98])))
    weight = weight.to(data.draw(st.sampled_from(TYPES))).clamp(-6e4, 6e4)
    size = data.draw(st.sampled_from(SIZES))
    compare(library, weight, size, data.draw(st.sampled_from(nf4.KINDS)), data.draw(st.booleans()))


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1, max_size=80),
    size=st.sampled_from((32, 64)),
    kind=st.sampled_from(nf4.KINDS),
    double=st.booleans(),
)
def test_any_numbers_have_the_bytes_of_bitsandbytes(library, values, size, kind, double):
    compare(library, torch.tensor(values), size, kind, double)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", nf4.KINDS)
def test_large_weights_are_shared_by_threads(library, kind, dtype):
    weight = torch.randn(1031, 4 * nf4_cpu.PIECE // 1000, generator=torch.Generator().manual_seed(3)).to(dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        compare(library, weight.t(), 64, kind, True)  # not contiguous either
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_work_in_inference_mode(dtype, search):
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(5)).to(dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = nf4.quantize(weight, search=search)
        with torch.inference_mode():
            found = nf4.quantize(weight * 1, search=search)
            values = nf4.dequantize(found)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found.packed, expected.packed)
    assert torch.equal(values, nf4.dequantize(expected))


def test_scales_around_every_threshold_of_the_8_bit_type(library):
    middle = (nf4.NESTED_CODE[:-1] + nf4.NESTED_CODE[1:]) / 2
    near = torch.cat([middle + step * 2.0**-17 for step in range(-4, 5)])
    largest = torch.cat([torch.tensor([2.0]), 1 + near])  # scales of blocks, before their mean is subtracted
    blocks = torch.zeros(len(largest), 32)
    blocks[:, 5] = largest
    compare(library, blocks, 32, "nf4", True)


# -- without bitsandbytes ---------------------------------------------------------------------------------------------


def test_known_bytes():
    weight = (torch.arange(1500) * 7919 % 1009 - 504).float() / 8192
    it = nf4.quantize(weight, double_quantise=True)
    digest = hashlib.sha256(it.packed.numpy().tobytes() + it.absmax.numpy().tobytes()).hexdigest()
    assert digest[:16] == "b548f0468e037a77"


@pytest.mark.parametrize("kind", nf4.KINDS)
@pytest.mark.parametrize("size", nf4.BLOCK_SIZES)
def test_codes_are_nearest_by_hand(kind, size):
    weight = torch.randn(2, size + 3, generator=torch.Generator().manual_seed(size)).double()
    it = nf4.quantize(weight.float(), block_size=size, kind=kind)
    table, flat = nf4.levels(kind).double(), weight.float().double().reshape(-1)
    for block in range(-(-len(flat) // size)):
        mine = flat[block * size : (block + 1) * size]
        scale = mine.abs().max()
        assert it.absmax[block].double() == scale
        least = (mine[:, None] / scale - table).abs().min(dim=1).values * scale
        read = nf4.dequantize(it).double().reshape(-1)[block * size : (block + 1) * size]
        torch.testing.assert_close((read - mine).abs(), least, atol=float(2e-7 * scale), rtol=0)


@pytest.mark.parametrize(("double", "bits"), [(False, "4.5000"), (True, "4.1270")])
def test_bits_per_weight_count_all_bytes(double, bits):
    it = nf4.quantize(torch.randn(1024, 1024), double_quantise=double)
    assert f"{it.bits_per_weight:.4f}" == bits


@pytest.mark.parametrize("numel", [1, 2, 9])
def test_packing_returns(numel):
    codes = torch.arange(numel, dtype=torch.uint8) + 5
    packed = nf4.pack(codes)
    assert packed[0] == (5 << 4 | (6 if numel > 1 else 0))
    assert torch.equal(nf4.unpack(packed, numel), codes)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", nf4.KINDS)
@pytest.mark.parametrize("shape", [(40, 70), (3, 5)])
def test_search_never_loses_more(kind, double, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(5)) ** 3
    kinds = {"kind": kind, "double_quantise": double}

    def errors(search: bool) -> Tensor:
        lost = (nf4.dequantize(nf4.quantize(weight, search=search, **kinds)) - weight).reshape(-1).double() ** 2
        return torch.nn.functional.pad(lost, (0, -len(lost) % 64)).reshape(-1, 64).sum(dim=1)

    plain, searched = errors(False), errors(True)
    if double:  # the 8 bits of a scale may move one block either way
        assert searched.sum() <= plain.sum()
    else:
        assert (searched <= plain * (1 + 1e-5)).all()
    if weight.numel() > 64:
        assert searched.sum() < 0.95 * plain.sum()


def test_search_meets_what_is_exact_and_survives_extremes():
    exact = nf4.levels("nf4").repeat(8)[None] * torch.tensor([[3e38], [1e-30], [0.0], [0.07]])
    it = nf4.quantize(exact, block_size=32, search=True)
    torch.testing.assert_close(nf4.dequantize(it), exact, rtol=1e-6, atol=0)


def test_quantised_weights_stay_on_the_meta_device():
    weight = torch.empty(6, 50, dtype=torch.bfloat16, device="meta")
    it = nf4.quantize(weight, double_quantise=True)
    real = nf4.quantize(torch.randn(6, 50), double_quantise=True)
    assert it.packed.is_meta
    assert it.nested is not None
    assert it.absmax.shape == real.absmax.shape
    assert it.bits_per_weight == real.bits_per_weight
    read = nf4.dequantize(it)
    assert read.is_meta
    assert (read.shape, read.dtype) == (weight.shape, weight.dtype)


def test_reading_can_be_traced():
    it = nf4.quantize(torch.randn(7, 33))

    def read(packed: Tensor, scales: Tensor) -> Tensor:
        return nf4.dequantize_flat(packed, scales, numel=231, block_size=64, kind="nf4", dtype=torch.float16)

    graph = make_fx(read, tracing_mode="fake")(it.packed, it.absmax)
    assert torch.equal(graph(it.packed, it.absmax).view(7, 33), nf4.dequantize(it, torch.float16))
    with FakeTensorMode() as mode:
        fake = nf4.Quantised(mode.from_tensor(it.packed), mode.from_tensor(it.absmax), (7, 33), torch.bfloat16)
        assert nf4.dequantize(fake).shape == (7, 33)


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.tensor([1.0, math.inf, math.nan, -math.inf]), {}, "3 of 4 weights are not finite .1 NaN, 2 infinite"),
        (torch.full((70,), math.nan, dtype=torch.float16), {}, "70 of 70"),
        (torch.tensor([0.0] * 64 + [math.inf] * 64), {}, "64 of 128"),
        (torch.arange(64), {}, "a int64 weight"),
        (torch.ones(64, dtype=torch.complex64), {}, "a complex64 weight"),
        (torch.ones(64, dtype=torch.float64), {}, "a float64 weight"),
        (torch.ones(0, 64), {}, r"shape \[0, 64\] has nothing"),
        (torch.ones(64), {"block_size": 48}, "not 48"),
        (torch.ones(64), {"block_size": 8}, "not 8"),
        (torch.ones(64), {"block_size": True}, "not True"),
        (torch.ones(64), {"block_size": 8192}, "not 8192"),
        (torch.ones(64), {"kind": "int4"}, "not 'int4'"),
    ],
)
def test_refusals(weight, options, message):
    with pytest.raises(ValueError, match=message):
        nf4.quantize(weight, **options)
