"""What a user may ask of training; kept apart from the code so that reading a config is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

Positive = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
Seed = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Fraction = Annotated[float, Meta(ge=0.0, lt=1.0)]


@dataclass(frozen=True)
class DataOptions:
    """Section `data` of a config.

    Attributes:
      source: "pydoc" is real English text that every Python carries; the others read `path`.
      path: a file, or a glob of files, for the sources text, jsonl and parquet.
      field: the JSONL key or Parquet column that holds the text.
      tokenizer: "byte" needs nothing; "bpe" trains one on the data (extra `tokenizers`).
      vocab_size: vocabulary of a trained tokenizer; bytes always have 256.
      sequence_length: tokens per sample.
      eval_fraction: share of the text, at its end, held out for evaluation.
      packing: false cuts the text into samples wherever they end; true packs whole documents
        into samples, each seeing itself only. Longer ones are cut.
      dispatch: documents of their own lengths are the samples; those of a step are shared out
        to the plan's pipelines so that all end together, and packed there.
    """

    source: Literal["pydoc", "text", "jsonl", "parquet"] = "pydoc"
    path: str | None = None
    field: str = "text"
    tokenizer: Literal["byte", "bpe"] = "byte"
    vocab_size: Annotated[int, Meta(ge=257)] = 8192
    sequence_length: Positive = 128
    eval_fraction: Fraction = 0.05
    packing: bool = False
    dispatch: bool = False


@dataclass(frozen=True)
class DispatchOptions:
    """Section `dispatch` of a config: how `data.dispatch` shares a step out.

    Attributes:
      row_tokens: of a row of each pipeline, which takes no longer documents; empty takes
        `data.sequence_length` for all.
      gap: by which share a step may be above the best assignment.
    """

    row_tokens: tuple[Positive, ...] = ()
    gap: Annotated[float, Meta(ge=0.0)] = 0.01


@dataclass(frozen=True)
class BucketOptions:
    """Section `buckets` of a config.

    Attributes:
      lengths: tokens of a row of each bucket, ascending, the last `data.sequence_length`;
        empty has no buckets. Documents are the samples then; each is padded to the length of
        its bucket and computed under the bucket's plan.
      plans: a plan file for each bucket, null for a plan that is searched; empty searches all.
      sequences: how many sequences the searched plan of each bucket takes at a time; empty takes
        `train.global_batch` of the shortest, and as many tokens of the others.
    """

    lengths: tuple[Positive, ...] = ()
    plans: tuple[str | None, ...] = ()
    sequences: tuple[Positive, ...] = ()

    def turn(self, number: int, global_batch: int) -> int:
        """Sequences that a bucket's searched plan takes at a time.

        >>> [BucketOptions(lengths=(32, 128)).turn(number, 16) for number in (0, 1)]
        [16, 4]
        """
        if self.sequences:
            return self.sequences[number]
        return max(1, global_batch * self.lengths[0] // self.lengths[number])


@dataclass(frozen=True)
class OptimizerOptions:
    """Section `optimizer` of a config.

    Attributes:
      name: the optax optimizer.
      learning_rate: its peak.
      schedule: shape after the warm-up; cosine and linear end at `final_fraction` of the peak.
      warmup_steps: steps of linear warm-up.
      decay_steps: steps until the schedule ends, warm-up included; None takes `train.steps`
        of the first run, and is written into the resolved config so that a longer second
        run continues on the same curve.
      final_fraction: last learning rate as a share of the peak.
      weight_decay: decoupled decay, applied to parameters of two and more dims.
      b1, b2, eps: as in Adam.
      momentum: for sgd.
    """

    name: Literal["adamw", "sgd", "lion", "adafactor"] = "adamw"
    learning_rate: Annotated[float, Meta(gt=0.0)] = 3e-4
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup_steps: Natural = 0
    decay_steps: Positive | None = None
    final_fraction: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.1
    weight_decay: Annotated[float, Meta(ge=0.0)] = 0.1
    b1: Fraction = 0.9
    b2: Fraction = 0.95
    eps: Annotated[float, Meta(gt=0.0)] = 1e-8
    momentum: Fraction = 0.9

    def decay_end(self, steps: int) -> int:
        """The step at which the schedule ends in a run of so many steps.

        A trial shorter than the warm-up is still a run: it just never decays.

        >>> OptimizerOptions(warmup_steps=10).decay_end(3)
        11
        """
        return self.decay_steps or max(steps, self.warmup_steps + 1)


@dataclass(frozen=True)
class TrainOptions:
    """Section `train` of a config.

    Attributes:
      steps: optimizer steps in all, resumed ones included.
      global_batch: sequences per optimizer step over all devices; micro-batch and
        accumulation are derived from it and printed.
      seed: of the parameters, the dropout and the order of the data.
      run_dir: where the run lives; None makes `runs/<config>/<time>`.
      log_every: steps between progress records.
      eval_every: steps between evaluations; 0 evaluates only at the end.
      eval_batches: batches per evaluation.
      log_samples: write the ids of each batch's samples into the metrics.
      sample_prompt: text a sample is generated from at the end; None generates none.
      sample_tokens: length of that sample.
      plan_schedule: plan files to train under in turn; empty keeps to one plan.
      switch_every: how many steps each of them is in force.
      stuck_after_s: with several processes, how long a step may take before a process reports
        what it waits for and ends; 0 waits forever.
    """

    steps: Positive = 100
    global_batch: Positive = 8
    seed: Seed = 0
    run_dir: str | None = None
    log_every: Positive = 10
    eval_every: Natural = 0
    eval_batches: Positive = 8
    log_samples: bool = False
    sample_prompt: str | None = None
    sample_tokens: Positive = 200
    plan_schedule: tuple[str, ...] = ()
    switch_every: Positive = 100
    stuck_after_s: Annotated[float, Meta(ge=0.0)] = 600.0
