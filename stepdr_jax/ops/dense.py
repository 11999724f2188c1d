"""Matrix product with a kernel, whose gradient keeps the kernel's layout.

Shape suffixes: X any leading dimensions, D model width, F width of the MLP.
"""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def dense(x: jax.Array, kernel_DF: jax.Array) -> jax.Array:
    """x[..., D] @ kernel_DF in x's dtype.

    The gradient of the kernel is accumulated in float32 and computed as [D, F]. The derived rule computes it
    as [F, D] and transposes, for which XLA on a CPU lays out every cotangent a second time: a quarter of a small
    model's step.
    """
    return x @ kernel_DF.astype(x.dtype)


def _forward(x, kernel_DF):
    return dense(x, kernel_DF), (x, kernel_DF)


def _backward(saved, g):
    x, kernel_DF = saved
    g_x = jnp.einsum("...F,DF->...D", g, kernel_DF.astype(g.dtype))
    x_XD, g_XF = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    g_kernel_DF = jnp.einsum("XD,XF->DF", x_XD, g_XF, preferred_element_type=jnp.float32)
    return g_x, g_kernel_DF.astype(kernel_DF.dtype)


dense.defvjp(_forward, _backward)
