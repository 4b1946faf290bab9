"""Eight virtual CPU devices for every test, and one compilation cache for the whole session.

All is asked for before jax starts its backend. Many tests train the same tiny
model; compiling it once is most of what they would otherwise do. Most of the rest is LLVM
making tiny programs fast, which is left out; the documentation's commands are compiled as users
compile them, and so is everything with SHARDPAR_OPTIMISED=1.
"""

import os
import tempfile
from pathlib import Path

import jax

from shardpar.lowering.devices import use_virtual_devices

CACHE = Path(os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp("-shardpar-xla")))

if not os.environ.get("SHARDPAR_OPTIMISED"):
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    jax.config.update("jax_disable_most_optimizations", True)
use_virtual_devices(8)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
