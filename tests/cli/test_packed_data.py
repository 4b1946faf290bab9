"""`data.packing` as people use it: trained, resumed exactly, refused where it would be wrong."""

from __future__ import annotations

from tests.cli.command import LONG, ROOT, TINY, losses, shardpar

GPT = str(ROOT / "configs" / "gpt.gin")
PACKED = (
    "train", GPT, *TINY, "data.packing=true", "train.log_samples=true", "train.eval_every=0",
    "checkpoint.every_steps=3", "--devices", "1",
)  # fmt: skip

IGNORANT = '''"""A model of single tokens that has not heard of packing."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx


@dataclass(frozen=True)
class PairOptions:
    vocab_size: int = 256


def build(options, rngs):
    return nnx.Embed(options.vocab_size, options.vocab_size, rngs=rngs)


def loss(model, batch):
    picked = jnp.take_along_axis(
        jax.nn.log_softmax(model(batch["inputs"])), batch["targets"][..., None], -1
    )
    return -jnp.mean(picked)
'''


@LONG
def test_a_packed_run_that_stopped_goes_on_as_if_it_had_not(tmp_path):
    shardpar(*PACKED, "train.steps=6", "train.run_dir=calm", cwd=tmp_path)
    shardpar(*PACKED, "train.steps=3", "train.run_dir=wild", cwd=tmp_path)
    shardpar("train", "--resume", "wild", "train.steps=6", "--devices", "1", cwd=tmp_path)
    calm = losses(tmp_path / "calm")
    assert len(calm) == 6
    assert losses(tmp_path / "wild") == calm


def test_a_model_that_would_mix_documents_is_refused(tmp_path):
    (tmp_path / "pair.py").write_text(IGNORANT)
    (tmp_path / "pair.yaml").write_text("model: {source: pair.py}\n")
    command = ("train", "pair.yaml", "data.packing=true", "--dry-run")
    done = shardpar(*command, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert (
        f"data.packing is true, but the loss of {tmp_path / 'pair.py'} does not read "
        'batch["segment_ids"] and batch["weights"]: it would take the documents of a row for one; '
        "let it read them as models/gpt.py does, or write data.packing=false"
    ) in done.stderr.replace("\n", " ")
