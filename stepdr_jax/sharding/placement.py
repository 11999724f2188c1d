"""One device's part of the model's mathematics under shard_map: where it gathers, sums and meets its neighbours.

The residual stream is split by batch (data, fsdp) and sequence (context) and whole over tensor. Parameters rest split
(`rules`), are gathered where they are used, one mesh axis after the other and in the compute dtype, and the transpose
of each gather scatters the summed gradient back: no device ever holds or reduces a whole stacked weight.
"""

import dataclasses
import functools

import jax

from stepdr_jax.ops.attention import attention
from stepdr_jax.ops.context_parallel import context_attention
from stepdr_jax.ops.vocab_loss import Head

Spec = tuple[tuple[str, ...], ...]  # mesh axes of each dimension


@dataclasses.dataclass(frozen=True)
class Placement:
    """How the arrays that a device sees are parts of the whole ones; the default is one device that has everything.

    sizes: (axis, size) of the mesh axes larger than 1.
    specs: (parameter name, mesh axes of each dimension, the layer axis left out).
    strategy, zigzag: of context parallel attention; attention: backend.
    """

    sizes: tuple[tuple[str, int], ...] = ()
    specs: tuple[tuple[str, Spec], ...] = ()
    strategy: str = "none"
    zigzag: bool = False
    attention: str = "auto"

    def size(self, axis: str) -> int:
        return dict(self.sizes).get(axis, 1)

    def spec(self, name: str, ndim: int) -> Spec:
        """Mesh axes larger than 1 of each dimension of parameter `name`."""
        spec = dict(self.specs).get(name, ((),) * ndim)
        return tuple(tuple(axis for axis in axes if self.size(axis) > 1) for axes in spec)

    def weight(self, name: str, w: jax.Array, dtype) -> jax.Array:
        """The whole parameter, but for its split over tensor, in `dtype`; what crosses the mesh is of that dtype."""
        w = w.astype(dtype)
        for dim, axes in enumerate(self.spec(name, w.ndim)):
            for axis in reversed(axes):
                if axis != "tensor":
                    w = jax.lax.all_gather(w, axis, axis=dim, tiled=True)
        return w

    def layer(self, w: dict, dtype) -> dict:
        """The parameters of one layer, gathered; norms and biases stay as stored."""
        return {name: self.weight(name, a, dtype) if name.endswith("kernel") else a for name, a in w.items()}

    def embed(self, table_VD: jax.Array, tokens_BT: jax.Array, dtype) -> jax.Array:
        """x_BTD of token ids. Gathered rows are summed into a float32 gradient.

        With D split over context each device looks up its part of D for the tokens of the whole row, and an all-to-all
        turns parts of D into parts of the sequence: the table is never whole on a device, nor is its gradient.
        """
        rows, columns = self.spec("embedding", 2)
        for axis in reversed(rows):
            table_VD = jax.lax.all_gather(table_VD, axis, axis=0, tiled=True)
        for axis in reversed(columns):
            tokens_BT = jax.lax.all_gather(tokens_BT, axis, axis=1, tiled=True)
        x_BTD = table_VD[tokens_BT].astype(dtype)
        for axis in columns:
            x_BTD = jax.lax.all_to_all(x_BTD, axis, split_axis=1, concat_axis=2, tiled=True)
        return x_BTD

    def head(self, *, tied: bool, tiles: int = 1) -> Head:
        """How the unembedding, or the embedding it is `tied` to, is split, for the vocabulary loss."""
        v_axes, d_axes = self.spec("embedding" if tied else "unembedding", 2)
        tensor = ("tensor", self.size("tensor")) if "tensor" in v_axes else ("", 1)
        return Head(tuple(axis for axis in v_axes if axis != "tensor"), d_axes, tensor, tiles)

    def enter(self, x: jax.Array) -> jax.Array:
        """Before kernels split by column over tensor: x itself; its gradient is summed over them."""
        return _enter(x, "tensor") if self.size("tensor") > 1 else x

    def leave(self, x: jax.Array) -> jax.Array:
        """After kernels split by row over tensor: the sum of the parts; its gradient goes to each as it is."""
        return _leave(x, "tensor") if self.size("tensor") > 1 else x

    def attend(self, q_BTHK, k_BTNK, v_BTNK, positions_BT, segment_ids_BT) -> jax.Array:
        """Causal attention within segments of the whole row; o_BTHK of this device's tokens."""
        if self.size("context") > 1:
            return context_attention(
                q_BTHK,
                k_BTNK,
                v_BTNK,
                positions_BT,
                segment_ids_BT,
                strategy=self.strategy,
                axis_size=self.size("context"),
                zigzag=self.zigzag,
                backend=self.attention,
            )
        return attention(
            q_BTHK,
            k_BTNK,
            v_BTNK,
            query_positions_BT=positions_BT,
            key_positions_BS=positions_BT,
            query_segments_BT=segment_ids_BT,
            key_segments_BS=segment_ids_BT,
            in_order=True,
            backend=self.attention,
        )


WHOLE = Placement()


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _enter(x, axis):
    return x


_enter.defvjp(lambda x, axis: (x, None), lambda axis, _, g: (jax.lax.psum(g, axis),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _leave(x, axis):
    return jax.lax.psum(x, axis)


_leave.defvjp(lambda x, axis: (_leave(x, axis), None), lambda axis, _, g: (g,))
