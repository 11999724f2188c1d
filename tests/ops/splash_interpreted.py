"""Run in a process of its own: the splash kernel, interpreted on CPU devices, against dense attention.

One JSON line of largest errors for each case of the named set, as eight_devices.py prints them.
"""

import json
import sys

import eight_devices
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

_semantics = interpreter._get_parallel_dim_semantics


def _semantics_of_batched(params, dimensions):
    """The interpreter forgets the grid dimension that vmap adds in front; the compiler calls it parallel."""
    given = params.dimension_semantics
    if given is None:
        return _semantics(params, dimensions)
    return (True,) * (dimensions - len(given)) + _semantics(params, len(given))


interpreter._get_parallel_dim_semantics = _semantics_of_batched

CASES = {
    "quick": (
        dict(strategy="ring", n=2, zigzag=True, packed=True, heads=(2, 1), length=512),
        dict(strategy="all_gather", n=2, zigzag=True, packed=True, heads=(4, 2), length=512),
    ),
    "slow": (
        dict(strategy="ring", n=4, zigzag=True, packed=False, heads=(4, 2), length=1024),
        dict(strategy="ring", n=2, zigzag=False, packed=True, heads=(2, 2), length=512),
        dict(strategy="all_gather", n=4, zigzag=False, packed=True, heads=(2, 1), length=512),
        dict(strategy="ulysses", n=2, zigzag=True, packed=True, heads=(4, 2), length=512),
    ),
}

if __name__ == "__main__":
    with pltpu.force_tpu_interpret_mode():
        for case in CASES[sys.argv[1]]:
            errors = eight_devices.errors(**case, head_dim=128, backend="splash")
            print(json.dumps(case | {"errors": errors}), flush=True)
