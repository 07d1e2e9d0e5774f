"""The stand-in for an NVIDIA GPU (`cuda_device.py`) does what a GPU does, and finds errors that a
GPU would not forgive."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from cuda_device import H100, compile_here, driver, open_here
from metal_device import needs_gxx

from osscompile import here
from osscompile.codegen.cuda import PRELUDE
from osscompile.errors import CompileError
from osscompile.runtime.devices import cuda_driver
from osscompile.runtime.devices.cuda import CudaDevice
from osscompile.runtime.devices.program import Launch, Launches
from osscompile.runtime.errors import ArtifactError

pytestmark = needs_gxx


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return tmp_path / "lib.fatbin"


def run_kernel(
    image: Path, body: str, threads: int, *inputs: np.ndarray, added: int = 0
) -> np.ndarray:
    """Run a kernel that fills out[threads x 4] int32 in one block; `inputs` are int32 a, b, c. The
    launch adds `added` bytes of shared memory."""
    pointers = "int* out, int* a, int* b, int* c"
    head = f'extern "C" __global__ void __launch_bounds__({threads}) f({pointers}) {{'
    compile_here(f"{PRELUDE}{head}\n{body}\n}}\n", H100, image)
    arguments = tuple(("bound", i) for i in range(4))
    launches = Launches((), (Launch("f", arguments, (1,), (threads,), added),))
    device = CudaDevice(image, {"f": launches}, open_here())
    out = np.full(threads * 4, -1, np.int32)
    arrays = [*inputs, *[np.zeros(1, np.int32)] * (3 - len(inputs))]
    bound = [device.tensor(array) for array in (out, *arrays)]
    device.call("f", bound)
    device.read(bound[0], out)
    return out


def test_matrix_units_multiply_signed_bytes(image: Path) -> None:
    """16 x 32 by 32 x 8, and the addend, lie in a warp's registers as NVIDIA describes."""
    rng = np.random.default_rng(0)
    a = rng.integers(-128, 128, (16, 32), dtype=np.int8)
    b = rng.integers(-128, 128, (32, 8), dtype=np.int8)
    c = rng.integers(-(1 << 20), 1 << 20, (16, 8), dtype=np.int32)
    body = """  int lane = threadIdx.x, row = lane >> 2, quad = lane % 4;
  int sums[4] = {c[row * 8 + quad * 2], c[row * 8 + quad * 2 + 1],
                 c[(row + 8) * 8 + quad * 2], c[(row + 8) * 8 + quad * 2 + 1]};
  mma_16x8x32(sums, sums + 1, sums + 2, sums + 3, a[row * 8 + quad], a[(row + 8) * 8 + quad],
              a[row * 8 + quad + 4], a[(row + 8) * 8 + quad + 4], b[row * 8 + quad],
              b[row * 8 + quad + 4]);
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = sums[i];"""
    words = a.reshape(-1).view(np.int32), np.ascontiguousarray(b.T).reshape(-1).view(np.int32)
    out = run_kernel(image, body, 32, *words, c.reshape(-1))
    of_lanes = out.reshape(8, 4, 2, 2)  # row, quad, row + 8 or not, column
    found = of_lanes.transpose(2, 0, 1, 3).reshape(16, 8)
    np.testing.assert_array_equal(found, a.astype(np.int32) @ b.astype(np.int32) + c)


def test_matrix_units_need_the_whole_warp(image: Path) -> None:
    body = "  if (threadIdx.x != 3) mma_16x8x32(out, out, out, out, 0, 0, 0, 0, 0, 0);"
    with pytest.raises(ArtifactError, match=r"31 of 32 threads wait for lanes of their SIMD-group"):
        run_kernel(image, body, 32)


# --- Products of a warpgroup, and copies that run meanwhile --------------------------------------

# 64 rows x 16 inputs in registers by 64 rows x 64 in shared memory: `a` holds a thread's four
# words, `b` the rows with their pieces in place.
PRODUCT = """  extern __shared__ __align__(1024) unsigned shared[];
  int t = threadIdx.x;
  float sums[32];
  for (int i = 0; i < 32; ++i) sums[i] = i;
  for (int i = 0; i < 4; ++i) copy_16(shared + (i * 128 + t) * 4, b + (i * 128 + t) * 4);
  copy_commit();
  copy_wait<0>();
  copy_show();
  __syncthreads();
  wgmma_begin();
  wgmma_64x64x16(sums, (const unsigned*)(a + t * 4), wgmma_describe(shared) + c[0]);
  wgmma_commit();
  wgmma_finish_64(sums);
  for (int i = 0; i < 4; ++i) out[t * 4 + i] = __builtin_bit_cast(int, sums[8 * i + t % 8]);"""
K16 = 2  # an operand of 16 inputs further on begins two times 16 bytes later


def product_inputs(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return what `PRODUCT` takes for small whole numbers, and the rows [64, 16] and [64, 64]."""
    rng = np.random.default_rng(seed)
    weights, rows = (rng.integers(-8, 9, (64, n)).astype(np.float32) for n in (16, 64))
    first = np.zeros((128, 4, 2), np.float32)
    for t, i, side in np.ndindex(first.shape):
        row, k = t // 32 * 16 + t % 32 // 4 + i % 2 * 8, i // 2 * 8 + t % 4 * 2 + side
        first[t, i, side] = weights[row, k]
    second = np.zeros((64, 8, 8), np.float32)
    for row, piece in np.ndindex(64, 8):
        second[row, piece ^ row % 8] = rows.reshape(64, 8, 8)[row, piece]
    words = (x.astype(ml_dtypes.bfloat16).reshape(-1).view(np.int32) for x in (first, second))
    return (*words, weights, rows)


def run_product(image: Path, body: str, step: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return what a thread holds of `PRODUCT`, or of a body made of it, and what it should."""
    first, second, weights, rows = product_inputs(0)
    offset = np.array([step * K16], np.int32)
    out = run_kernel(image, body, 128, first, second, offset, added=8192)
    expected = weights @ rows[:, step * 16 : step * 16 + 16].T
    wanted = np.zeros((128, 4), np.float32)
    for t, j in np.ndindex(128, 4):
        i = 8 * j + t % 8
        row, column = t // 32 * 16 + t % 32 // 4 + i // 2 % 2 * 8, i // 4 * 8 + t % 4 * 2 + i % 2
        wanted[t, j] = i + expected[row, column]
    return out.view(np.float32).reshape(128, 4), wanted


def between(before: str, statement: str) -> str:
    """Return `PRODUCT` with a statement before that line."""
    assert f"{before}\n" in PRODUCT
    return PRODUCT.replace(f"{before}\n", f"{statement}\n{before}\n")


@pytest.mark.parametrize("step", [0, 3])
def test_matrix_units_multiply_for_a_warpgroup(image: Path, step: int) -> None:
    """64 x 16 by 16 x 64, whose rows lie in 128 bytes with pieces that change places."""
    found, wanted = run_product(image, PRODUCT, step)
    np.testing.assert_array_equal(found, wanted)


def test_sum_that_is_read_before_the_wait_is_none(image: Path) -> None:
    early = "  float early = sums[t % 8];"
    body = (
        between("  wgmma_finish_64(sums);", early)
        + "\n  out[t * 4] = __builtin_bit_cast(int, early);"
    )
    found, _ = run_product(image, body)
    assert np.isnan(found[:, 0]).all()


@pytest.mark.parametrize(
    "write", ["  shared[t * 16] = 0;", "  copy_16(shared + t * 16, b);\n  copy_commit();"]
)
def test_operand_that_is_overwritten_before_the_wait(image: Path, write: str) -> None:
    found, wanted = run_product(image, between("  wgmma_finish_64(sums);", write))
    assert not np.array_equal(found, wanted)


def test_copy_that_is_read_before_its_wait(image: Path) -> None:
    found, _ = run_product(image, PRODUCT.replace("copy_wait<0>", "copy_wait<1>"))
    assert np.isnan(found).all()


@pytest.mark.parametrize(
    ("left_out", "told"),
    [
        ("wgmma_begin();", "no fence before it"),
        ("copy_show();", "that the matrix units cannot see"),
        ("wgmma_finish_64(sums);", "a block that ends before its products"),
        ("wgmma_commit();", "threads wait for lanes"),
    ],
)
def test_what_a_product_needs(image: Path, left_out: str, told: str) -> None:
    with pytest.raises(ArtifactError, match=told):
        run_product(image, PRODUCT.replace(left_out, ""))


def test_product_that_a_warp_misses(image: Path) -> None:
    body = PRODUCT.replace("  wgmma_finish_64(sums);", "  if (t < 96) wgmma_finish_64(sums);")
    with pytest.raises(ArtifactError, match="96 of 128 threads wait for lanes"):
        run_product(image, body)


def test_last_group_that_a_wait_leaves(image: Path) -> None:
    """Its sums are not there."""
    found, _ = run_product(image, between("  wgmma_finish_64(sums);", "  wgmma_wait();"))
    early = "  wgmma_wait();\n  float early = sums[0];"
    body = (
        between("  wgmma_finish_64(sums);", early)
        + "\n  out[t * 4] = __builtin_bit_cast(int, early);"
    )
    assert np.isnan(run_product(image, body)[0][:, 0]).all() and not np.isnan(found).any()


def test_memory_that_a_launch_adds_ends(image: Path) -> None:
    body = (
        "  extern __shared__ __align__(1024) unsigned shared[];\n  shared[{}] = 1;\n  out[0] = 1;"
    )
    most = H100.shared_bytes
    assert run_kernel(image, body.format(most // 4 - 1), 32, added=most)[0] == 1
    with pytest.raises(ArtifactError, match="illegal address"):
        run_kernel(image, body.format(most // 4), 32, added=most)
    with pytest.raises(ArtifactError, match="invalid value"):
        run_kernel(image, body.format(0), 32, added=most + 1)


def test_pairs_of_bfloat16(image: Path) -> None:
    """Products of what is too small to be normal are exact; a pair is rounded to even."""
    body = """  out[0] = multiply_bf16x2(0x00408040, 0x7e807e80);
  out[1] = pack_bf16x2(1.00390625f, -1.01171875f);"""
    found = run_kernel(image, body, 1)[:2].view(np.uint32).view(ml_dtypes.bfloat16)
    assert found[:4].tolist() == [-0.5, 0.5, 1.0, -1.015625]


def test_four_bytes_at_a_time(image: Path) -> None:
    body = "  out[threadIdx.x] = dot_4x8(0x80ff017f, 0x8002fd7f);"
    assert run_kernel(image, body, 1)[0] == 128 * 128 - 2 - 3 + 127 * 127


def test_lanes_shuffle_what_the_mask_names(image: Path) -> None:
    """A lane keeps its own value beyond the warp, and gets none from lanes outside the mask."""
    body = """  int lane = threadIdx.x;
  if (lane % 4 != 2) {
    unsigned mask = __activemask();
    out[lane * 4] = mask;
    out[lane * 4 + 1] = __shfl_down_sync(mask, lane, 1, 32);
    out[lane * 4 + 2] = __shfl_sync(mask, lane, 37, 32);
  }"""
    out = run_kernel(image, body, 64).reshape(64, 4)
    for lane, (mask, down, fifth, _) in enumerate(out.tolist()):
        if lane % 4 == 2:
            assert (mask, down, fifth) == (-1, -1, -1)
        else:
            assert mask & 0xFFFFFFFF == 0xBBBBBBBB
            assert fifth == lane // 32 * 32 + 5
            nobody = lane % 4 == 1
            assert down == (0x7FC00BAD if nobody else lane if lane % 32 == 31 else lane + 1)


def test_lanes_exchange_with_those_that_differ_in_some_bits(image: Path) -> None:
    body = "  out[threadIdx.x * 4] = __shfl_xor_sync(0xffffffff, int(threadIdx.x), 5, 32);"
    found = run_kernel(image, body, 64)[::4]
    np.testing.assert_array_equal(found, np.arange(64) ^ 5)


def test_shuffle_that_a_named_lane_misses(image: Path) -> None:
    body = "  if (threadIdx.x > 3) out[threadIdx.x] = __shfl_down_sync(0xffffffff, 1, 1, 32);"
    with pytest.raises(ArtifactError, match=r"28 of 32 threads wait for lanes"):
        run_kernel(image, body, 32)


def test_barrier_that_some_threads_miss(image: Path) -> None:
    with pytest.raises(ArtifactError, match=r"3 of 40 threads wait at a barrier"):
        run_kernel(image, "  if (threadIdx.x < 3) __syncthreads();", 40)


@pytest.mark.parametrize("turn", ["forwards", "backwards"])
def test_barrier_that_is_missing(image: Path, turn: str) -> None:
    """A block's shared memory begins as NaN, and its threads start at either end by turns."""
    body = """  __shared__ alignas(64) int x[40];
  x[threadIdx.x] = 7;
BARRIER
  out[threadIdx.x] = x[39 - threadIdx.x];"""
    found = run_kernel(image, body.replace("BARRIER", ""), 40)[:40]
    assert (found == 7).sum() == 20
    found = run_kernel(image, body.replace("BARRIER", "  __syncthreads();"), 40)[:40]
    assert (found == 7).all()


def test_too_much_shared_memory(image: Path) -> None:
    body = "  __shared__ alignas(64) int x[{}];\n  x[threadIdx.x] = 0;"
    run_kernel(image, body.format(12 << 10), 32)
    with pytest.raises(ArtifactError, match=r"a block with too much shared memory"):
        run_kernel(image, body.format((12 << 10) + 1), 32)


@pytest.mark.parametrize("use", ["out[300] = 1", "out[0] = a[300]", "out[0] = a[-(1L << 40)]"])
def test_address_beyond_what_was_allocated(image: Path, use: str) -> None:
    """The device is lost, but a new process has it again."""
    with pytest.raises(ArtifactError, match=r"illegal address"):
        run_kernel(image, f"  {use};", 32)
    assert run_kernel(image, "  out[threadIdx.x] = 1;", 32).sum() == 32 - 96


@pytest.mark.parametrize(
    "use",
    [
        "max(1, 2.0f)",
        "min(threadIdx.x, (long)1)",
        "exp(1.0f)",
        "rint(1.5f)",
        "__shfl_down(1, 1, 32)",
        "get_group_id(0)",
        'asm("bar.sync %0;" : : "r"(a0))',
    ],
)
def test_what_cuda_does_not_have_or_we_do_not_use(image: Path, use: str) -> None:
    with pytest.raises(CompileError, match="g\\+\\+ refuses the source"):
        run_kernel(image, f"  unsigned a0 = 0;\n  out[a0] = {use};", 1)


def test_matrix_units_multiply_the_upper_bits_of_floats(image: Path) -> None:
    """The units multiply 16 x 8 by 8 x 8 and add; they read 19 bits."""
    rng = np.random.default_rng(0)
    a, b, c = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((16, 8), (8, 8), (16, 8))
    )
    body = """  int lane = threadIdx.x, row = lane >> 2, quad = lane % 4;
  const float* added = (const float*)c;
  float sums[4] = {added[row * 8 + quad * 2], added[row * 8 + quad * 2 + 1],
                   added[(row + 8) * 8 + quad * 2], added[(row + 8) * 8 + quad * 2 + 1]};
  mma_16x8x8(sums, sums + 1, sums + 2, sums + 3, a[row * 8 + quad], a[(row + 8) * 8 + quad],
             a[row * 8 + quad + 4], a[(row + 8) * 8 + quad + 4], b[quad * 8 + row],
             b[(quad + 4) * 8 + row]);
  for (int i = 0; i < 4; ++i) ((float*)out)[lane * 4 + i] = sums[i];"""
    out = run_kernel(image, body, 32, *(x.reshape(-1).view(np.int32) for x in (a, b, c)))
    found = out.view(np.float32).reshape(8, 4, 2, 2).transpose(2, 0, 1, 3).reshape(16, 8)
    read = [(x.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64) for x in (a, b)]
    np.testing.assert_allclose(found, read[0] @ read[1] + c, rtol=0, atol=2e-6)


def test_matrix_units_multiply_halves_that_were_loaded_transposed(image: Path) -> None:
    """The units multiply 16 x 16 by 16 x 8 and add. The second factor lies by inputs, not by
    columns: a load gives its words for two products, of which each warp does one."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((16, 16)).astype(np.float16) for _ in range(2))
    body = """  extern __shared__ __align__(1024) unsigned shared[];
  int lane = threadIdx.x % 32, half = threadIdx.x / 32, row = lane >> 2, quad = lane % 4;
  for (int i = threadIdx.x; i < 128; i += 64) shared[i] = b[i];
  __syncthreads();
  unsigned words[4];
  load_transposed(words, shared, lane % 16 * 8 + lane / 16 * 4);
  float sums[4] = {0, 0, 0, 1};
  mma_16x8x16(sums, sums + 1, sums + 2, sums + 3, a[row * 8 + quad], a[(row + 8) * 8 + quad],
              a[row * 8 + quad + 4], a[(row + 8) * 8 + quad + 4], words[half * 2],
              words[half * 2 + 1]);
  for (int i = 0; i < 4; ++i) ((float*)out)[threadIdx.x * 4 + i] = sums[i];"""
    arrays = [x.reshape(-1).view(np.int32) for x in (a, b)]
    out = run_kernel(image, body, 64, *arrays, added=512).view(np.float32)
    found = out.reshape(2, 8, 4, 2, 2).transpose(3, 1, 0, 2, 4).reshape(16, 16)
    added = np.zeros((16, 16))
    added[8:, 1::2] = 1
    expected = a.astype(np.float64) @ b.astype(np.float64) + added
    np.testing.assert_allclose(found, expected, rtol=0, atol=4e-6)


def test_halves_are_rounded_to_even_and_powers_flushed(image: Path) -> None:
    body = """  ((unsigned*)out)[0] = pack_f16x2(1.00048828125f, -1e6f);
  ((float*)out)[1] = exp2_approximately(-3.0f);
  ((float*)out)[2] = exp2_approximately(-126.5f);
  ((float*)out)[3] = exp2_approximately(-1e30f);"""
    found = run_kernel(image, body, 1)[:4].view(np.float32)
    assert found[:1].view(np.float16).tolist() == [1.0, -np.inf]
    assert found[1:].tolist() == [0.125, 0, 0]


def test_bytes_are_selected_and_signs_repeated(image: Path) -> None:
    """The result is what NVIDIA describes for prmt without a mode."""
    low, high = 0x83020100, 0x87060504
    selectors = {0x3210: low, 0x7654: high, 0x0427: 0x00040287, 0x8CBF: 0x0000FFFF}
    body = f"  out[threadIdx.x * 4] = select_bytes({low}u, {high}u, a[threadIdx.x] | 0x77770000);"
    out = run_kernel(image, body, 4, np.array(list(selectors), np.int32))
    np.testing.assert_array_equal(out[::4].view(np.uint32), list(selectors.values()))


def test_its_driver_tells_what_to_compile_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "DRIVER", str(driver()))
    monkeypatch.setattr(here, "find_nvcc", lambda: "nvcc")
    assert here.target_here() == H100
