"""Feature engineering over parties: fitted together, applied by each party to its own rows.

    from shardpar.fl.features import scaling

    fitted = scaling.standard(sums, rows, ranges)     # at every party, the same result
    rows = fitted.apply(rows)

A fitted transform is a frozen dataclass of plain numbers, the same at all parties: `msgspec` writes
and reads it. What its numbers reveal is what `shardpar.fl.stats` says of the statistics they are.
"""
