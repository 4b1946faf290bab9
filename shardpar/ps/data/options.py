"""What a user may ask of sparse data; apart from the code, so that reading a config is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

Positive = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
Seed = Annotated[int, Meta(ge=0, le=2**32 - 1)]

Format = Literal[
    "auto", "clicks", "sklearn", "libsvm", "dummy", "libffm", "criteo", "csv", "parquet"
]


@dataclass(frozen=True)
class SparseDataOptions:
    """Section `data` of a config for sparse models.

    Attributes:
      format: "auto" looks at the first lines of the file; "clicks" is the generated click log,
        which needs no file; "sklearn" is a data set that scikit-learn carries, whose name is
        `path`: breast_cancer, diabetes, digits, iris or wine. The rest are files.
      path: the training file, or a glob of files, plain or gzip-compressed.
      eval_path: the same for evaluation; None evaluates nothing.
      rows: ids are 0 … rows−1. Required where ids are hashed onto a table; None takes any id up
        to 2⁶³−1, for tables that map 64-bit ids to slots themselves.
      hashed: whether integer ids are hashed onto `rows`, salted by field, or taken as they are
        (then an id of `rows` or more is an error). Text is always hashed.
      slots: features per sample at most. None counts them in one pass over the files.
      field_count: libffm fields are below it; None takes any.
      zero_based: libsvm only: whether ids count from 0 in the file, not from 1.
      label: csv and parquet: column of the label.
      categorical: csv and parquet: columns that are features with an id, one field each.
      numeric: csv and parquet: columns that are dense features.
      missing: csv and parquet: what an empty numeric cell counts as; None makes it an error.
      delimiter: csv: the character between columns.
      header: csv: whether the first line names the columns; else they are "0", "1", ….
      integers: criteo: the 13 integers as dense log(1+x) ("log"), as they are ("raw"), or as 13
        more fields of buckets ⌊log²x⌋ ("bucket"). Missing ones count as 0, and as a bucket of
        their own.
      binary_labels: whether labels above 0 become 1, and others 0.
      bad_share: share of lines that may be unreadable. They are left out, counted and
        reported; one more is an error. 0 stops at the first. Within a pass it is taken of at
        least 10 000 lines, at its end of those there are.
      shuffle: how many samples are held to be shuffled; 0 keeps the order of the file. The
        parts that are read into it come in random order, too, unless they are compressed.
      seed: of the order, and of the generated click log.
      samples: clicks: how many to generate for training.
      eval_samples: clicks: how many for evaluation.
    """

    format: Format = "auto"
    path: str | None = None
    eval_path: str | None = None
    rows: Annotated[int, Meta(ge=1, le=2**32)] | None = None
    hashed: bool = False
    slots: Positive | None = None
    field_count: Positive | None = None
    zero_based: bool = False
    label: str = "label"
    categorical: tuple[str, ...] = ()
    numeric: tuple[str, ...] = ()
    missing: float | None = None
    delimiter: Annotated[str, Meta(min_length=1, max_length=1)] = ","
    header: bool = True
    integers: Literal["log", "raw", "bucket"] = "log"
    binary_labels: bool = False
    bad_share: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    shuffle: Natural = 65536
    seed: Seed = 0
    samples: Positive = 1_000_000
    eval_samples: Natural = 100_000
