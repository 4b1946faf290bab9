"""Paillier and Okamoto-Uchiyama beside phe and HEU, one core, in operations per CPU second.

    python -m benchmarks.fl_he                  # peers not installed are left out

Peers: `pip install phe sf-heu`. Every repetition runs all of them in turn.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from shardpar.fl.he import okamoto_uchiyama, paillier

Work = Callable[[list[int]], Any]


def ours(scheme: Any, bits: int, **how: Any) -> tuple[Work, Work]:
    """(encryption by someone without the secret key, decryption) of a scheme of shardpar's."""
    secret = scheme.generate(bits)
    public = secret.public
    public.encrypt([1])

    def decrypt(numbers: list[int]) -> Any:
        held = public.encrypt(numbers)

        def work() -> None:
            assert secret.decrypt(held, **how) == numbers

        return work

    return public.encrypt, decrypt


def of_phe(bits: int) -> tuple[Work, Work]:
    import phe

    public, secret = phe.generate_paillier_keypair(n_length=bits)

    def decrypt(numbers: list[int]) -> Any:
        held = [public.encrypt(n) for n in numbers]

        def work() -> None:
            assert [secret.decrypt(c) for c in held] == numbers

        return work

    return lambda numbers: [public.encrypt(n) for n in numbers], decrypt


def of_heu(schema: str, bits: int) -> tuple[Work, Work]:
    from heu import phe

    kit = phe.setup(getattr(phe.SchemaType, schema), bits)
    encryptor, decryptor = kit.encryptor(), kit.decryptor()

    def decrypt(numbers: list[int]) -> Any:
        held = [encryptor.encrypt_raw(n) for n in numbers]

        def work() -> None:
            assert [decryptor.decrypt_raw(c) for c in held] == numbers

        return work

    return lambda numbers: [encryptor.encrypt_raw(n) for n in numbers], decrypt


def rate(work: Callable[[], Any], count: int) -> float:
    """Operations per CPU second."""
    began = time.process_time()
    work()
    return count / (time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    bits = options.bits
    found: dict[str, tuple[int, tuple[Work, Work]]] = {
        "Paillier, shardpar": (400, ours(paillier, bits)),
        "Okamoto-Uchiyama, shardpar": (1000, ours(okamoto_uchiyama, bits, trusted=True)),
    }
    if importlib.util.find_spec("phe"):
        found["Paillier, phe"] = (20, of_phe(bits))
    if importlib.util.find_spec("heu"):
        found["Paillier (ZPaillier), HEU"] = (400, of_heu("ZPaillier", bits))
        found["Okamoto-Uchiyama, HEU"] = (4000, of_heu("OU", bits))
    rates: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in found}
    for _ in range(options.repeats):
        for name, (count, (encrypt, decrypt)) in found.items():
            numbers = [7 * n - 1000 for n in range(count)]
            rates[name][0].append(rate(lambda: encrypt(numbers), count))  # noqa: B023
            rates[name][1].append(rate(decrypt(numbers), count))
    print(f"{bits} bits, per CPU second, median of {options.repeats}")
    print("| scheme | encrypt | decrypt |\n|---|---|---|")
    for name, (encrypts, decrypts) in rates.items():
        print(f"| {name} | {median(encrypts):,.0f} | {median(decrypts):,.0f} |")


if __name__ == "__main__":
    main()
