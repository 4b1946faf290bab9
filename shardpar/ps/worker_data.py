"""The batches of workers in processes of their own: each worker's share of every global batch.

A worker reads its share of the files by itself. The batch of a step is the same whoever asks
for it and whenever, so that a worker which starts anew finds the batches it had.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shardpar.ps.data.batches import Process, SparseBatches, train_batches
from shardpar.ps.data.open import open_parts
from shardpar.ps.data.options import SparseDataOptions
from shardpar.ps.loop import Require, arrays_of, nothing_required


@dataclass
class WorkerData:
    """`data(worker, step)` for `ps.cluster.Cluster`: pickled without what it has open.

    Attributes:
      options: of the data.
      global_batch: samples per step over all workers, who share it evenly.
      workers: how many.
      per_epoch: batches of an epoch, as `steps_in` counts them.
      require: looks at the arrays of every batch, and raises what is wrong with them.

    Example: `WorkerData(options, 4096, workers=2, per_epoch=steps_in(options, 4096))` gives
    worker 1's 2048 samples of step 0 as `data(1, 0)`.
    """

    options: SparseDataOptions
    global_batch: int
    workers: int
    per_epoch: int
    require: Require = nothing_required
    _open: dict[int, tuple[int, SparseBatches]] = field(default_factory=dict, repr=False)

    def __call__(self, worker: int, step: int) -> dict[str, np.ndarray]:
        """The arrays of a worker's step, as `ps.loop.arrays_of` gives them.

        Raises:
          DataError: a line cannot be read.
        """
        due, batches = self._open.get(worker, (0, None))
        if batches is None or step < due:
            share = Process(worker, self.workers)
            source, _ = open_parts(self.options)
            batches = train_batches(source, self.options, self.global_batch, process=share)
            epoch = step // self.per_epoch
            batches.restore({**batches.position, "epoch": epoch})
            due = epoch * self.per_epoch
        batches.skip(step - due)
        self._open[worker] = (step + 1, batches)
        arrays = arrays_of(next(batches))
        if (step + 1) % self.per_epoch == 0:
            batches.end()
        self.require(arrays)
        return arrays

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": {}}


def steps_in(options: SparseDataOptions, global_batch: int) -> int:
    """How many batches an epoch has; reads the files once, without parsing them.

    >>> steps_in(SparseDataOptions(format="clicks", samples=1000), 300)
    4
    """
    if options.format == "clicks":
        return -(-options.samples // global_batch)
    source, _ = open_parts(options)
    return train_batches(source, options, global_batch, epochs=1).skip()
