"""Homomorphic encryption: sums and integer multiples of numbers that only the key's owner reads.

    from shardpar.fl.he import paillier

    secret = paillier.generate()                      # party A
    held = secret.public.encrypt([3, -4])             # A -> B
    answer = (held + [10, 10]).dot([2, 5])            # B, who reads nothing
    secret.decrypt(answer.rerandomised())             # A: [56]

`paillier` is the scheme to use; `okamoto_uchiyama` encrypts and decrypts several times faster but
must decrypt only what honest parties computed; `ckks` holds real numbers, approximately.
"""
