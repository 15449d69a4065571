"""What is read from compiled programs, against counts by hand, by brute force and by XLA."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jax_unlearn import sharding
from jax_unlearn.app.plan.hlo import Transfer, cost_of


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def compiled(function, *arguments, **options):
    return jax.jit(function, **options).lower(*arguments).compile()


def cost(function, *arguments, rare_share=1.0, **options):
    return cost_of(compiled(function, *arguments, **options).as_text(), rare_share=rare_share)


def test_a_loop_counts_as_often_as_it_runs():
    def looped(x, y):
        inner = lambda x, _: (jnp.tanh(x @ y), None)  # noqa: E731
        outer = lambda x, _: (jax.lax.scan(inner, x, length=3)[0], None)  # noqa: E731
        return jax.lax.scan(outer, x, length=5)[0] @ y

    program = compiled(looped, shape(16, 32), shape(32, 32))
    once = 2 * 16 * 32 * 32
    assert cost_of(program.as_text()).flops == 16 * once
    # What XLA says of the same program, which is why the text is read at all.
    assert program.cost_analysis()["flops"] < 4 * once


@pytest.mark.parametrize(
    ("stride", "padding", "inner", "outer"),
    [(1, ((1, 1), (1, 1)), 1, 1), (2, ((0, 1), (0, 1)), 1, 1), (1, ((2, 2), (3, 1)), 2, 1),
     (1, ((0, 0), (2, 2)), 1, 2)],
)  # fmt: skip
def test_a_convolution_counts_what_meets_the_image(stride, padding, inner, outer):
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, (inner, inner), (outer, outer),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    x, kernel = shape(2, 8, 10, 5), shape(3, 3, 5, 7)
    # Of ones, each output is the number of products that it is the sum of.
    products = convolve(jnp.ones(x.shape), jnp.ones(kernel.shape)).sum()
    assert cost(convolve, x, kernel).flops == pytest.approx(2 * float(products), rel=1e-6)


def test_a_network_and_its_gradient_agree_with_a_count_by_hand():
    def loss(weights, x):
        first, second = weights
        return jnp.square(jax.nn.silu(x @ first) @ second).sum()

    weights, x = (shape(24, 64), shape(64, 8)), shape(32, 24)
    found = cost(jax.grad(loss), weights, x)
    # Forward two products; backward two for the weights and one for the hidden layer.
    assert found.flops == pytest.approx(2 * 32 * (24 * 64 * 2 + 64 * 8 * 3), rel=0.03)


def test_bytes_are_those_that_are_read_and_written():
    count = 2**20
    assert cost(lambda x: x + 1, shape(count)).bytes == pytest.approx(8 * count, rel=0.01)
    summed = lambda xs: jax.lax.scan(lambda a, x: (a * 0.5 + x, None), xs[0], xs)[0]  # noqa: E731
    rows = 2**16
    found = cost(summed, shape(10, rows)).bytes
    # A slice, the sum before and after: not all ten rows each time.
    assert 10 * 3 * 4 * rows * 0.9 < found < 10 * 8 * 4 * rows


def test_collectives_are_counted_with_their_loops():
    mesh = sharding.device_mesh()
    split = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())

    def summed(x, y):
        def body(y, _):
            return jnp.tanh(jnp.square(x).mean(axis=0) + y), None

        def again(y, _):
            total = jax.lax.with_sharding_constraint((x * y).sum(axis=0), whole)
            return jnp.tanh(total), None

        y = jax.lax.scan(again, y, length=3)[0]
        return body(y, None)[0]

    found = cost(summed, shape(16, 40), shape(40), in_shardings=(split, whole), out_shardings=whole)
    # Three sums in the loop, whose result the next needs, and one after it.
    assert found.transfers == {"all-reduce": Transfer(4, 4 * 40 * 4)}


def test_gathered_bytes_are_those_of_the_whole():
    mesh = sharding.device_mesh()
    split = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    found = cost(lambda x: x + 1, shape(16, 40), in_shardings=split, out_shardings=whole)
    assert found.transfers == {"all-gather": Transfer(1, 16 * 40 * 4)}


def test_a_rare_branch_counts_by_its_share():
    def branched(often, x, y):
        return jax.lax.cond(often, lambda: x @ y @ y @ y, lambda: x @ y)

    given = shape(dtype=bool), shape(8, 8), shape(8, 8)
    once = 2 * 8**3
    assert cost(branched, *given).flops == 3 * once
    assert cost(branched, *given, rare_share=0.25).flops == 1.5 * once


def test_kernels_of_other_libraries_are_counted_where_they_say_their_shapes():
    text = """HloModule step
ENTRY %main (a: f32[4,8], b: f32[8,6], x: f32[2,9,9,3], k: f32[3,3,3,5]) -> f32[4,6] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,6]{1,0} parameter(1)
  %x = f32[2,9,9,3]{3,2,1,0} parameter(2)
  %k = f32[3,3,3,5]{3,2,1,0} parameter(3)
  %conv = (f32[2,7,7,5]{3,2,1,0}, u8[0]{0}) custom-call(%x, %k), window={size=3x3}, \
dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convForward"
  %part = f32[2,7,7,5]{3,2,1,0} get-tuple-element(%conv), index=0
  %back = (f32[3,3,3,5]{3,2,1,0}, u8[0]{0}) custom-call(%x, %part), window={size=3x3}, \
dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %mixed = (f32[2,9]{1,0}, u8[0]{0}) custom-call(%x), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %dot = (f32[4,6]{1,0}, s8[64]{0}) custom-call(%a, %b), \
custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":\
{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
}
"""
    found = cost_of(text)
    convolution = 2 * math.prod((2, 7, 7, 5)) * 3 * 3 * 3
    assert found.flops == 2 * 4 * 8 * 6 + 2 * convolution
    assert found.uncounted == ("__cudnn$fmhaSoftmax",)


def test_the_trips_of_a_loop_are_its_counter_where_the_compiler_does_not_say():
    def looped(x):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, length=7)[0]

    text = compiled(looped, shape(4, 4)).as_text()
    known = 'known_trip_count":{"n":"7"}'
    assert known in text
    assert cost_of(text.replace(known, "")).flops == cost_of(text).flops == 7 * 2 * 4**3


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        cost_of("module @jit_step {}")


def test_counts_are_of_one_chip():
    mesh = sharding.device_mesh()
    split = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    product = lambda x, y: x @ y  # noqa: E731
    found = cost(
        product, shape(64, 32), shape(32, 16), in_shardings=(split, whole), out_shardings=split
    )
    assert found.flops == 2 * 64 * 32 * 16 / np.size(mesh.devices)
