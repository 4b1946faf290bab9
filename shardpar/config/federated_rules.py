"""The rules between keys of a federation: what no round could do, told before one begins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from shardpar.config.schema import FederatedConfig
from shardpar.fl.options import SEES_EACH

Found = tuple[tuple[str, ...], str]

_BESIDE_DIFFERENCES = ("scaffold", "fednova", "fedbuff")
"""Their messages hold counts or controls, which a clip would cut together with the difference."""


def federated_rules(config: FederatedConfig) -> Iterator[Found]:
    """Keys that contradict each other, the likeliest culprit first, and what to write instead.

    >>> from dataclasses import replace
    >>> config = FederatedConfig()
    >>> list(federated_rules(config))
    []
    >>> krum = replace(config, federated=replace(config.federated, algorithm="krum"))
    >>> secret = replace(krum, secagg=replace(krum.secagg, enabled=True))
    >>> next(federated_rules(secret))[0]
    ('federated.algorithm', 'secagg.enabled')
    """
    for rule in (_data, _cohort, _secagg, _privacy, _net):
        yield from rule(config)


def _data(config: FederatedConfig) -> Iterator[Found]:
    data = config.data
    if data.format == "clients" and data.path is None:
        yield (
            ("data.path", "data.format"),
            "data.format is 'clients' but data.path is not set; write data.path=FOLDER, or "
            "data.format=digits",
        )
    if data.format == "digits":
        for key in ("path", "eval_path"):
            if getattr(data, key) is not None:
                yield (
                    (f"data.{key}", "data.format"),
                    f"data.{key} is set but data.format is 'digits', which reads no folder; write "
                    "data.format=clients",
                )


def _cohort(config: FederatedConfig) -> Iterator[Found]:
    data, federated = config.data, config.federated
    if data.format == "digits" and (federated.cohort or 0) > data.clients:
        yield (
            ("federated.cohort", "data.clients"),
            f"federated.cohort ({federated.cohort}) is more than data.clients ({data.clients}); "
            f"write federated.cohort={data.clients} or less",
        )
    if federated.algorithm == "fedbuff" and federated.cohort is not None:
        yield (
            ("federated.cohort", "federated.algorithm"),
            "fedbuff has no cohorts; leave federated.cohort out, and write federated.buffer for "
            "how many updates make a step",
        )
    if federated.algorithm == "krum":
        least = 2 * federated.byzantine + 3
        most = federated.cohort or (data.clients if data.format == "digits" else least)
        if most < least:
            yield (
                ("federated.byzantine", "federated.cohort", "data.clients"),
                f"krum with federated.byzantine={federated.byzantine} needs rounds of {least} "
                f"clients or more, and there are {most}; write federated.byzantine="
                f"{max(0, (most - 3) // 2)}, or have more clients",
            )


def _secagg(config: FederatedConfig) -> Iterator[Found]:
    name = config.federated.algorithm
    if not config.secagg.enabled:
        return
    if name in SEES_EACH:
        yield (
            ("federated.algorithm", "secagg.enabled"),
            f"{name} looks at every update, and secure aggregation shows their sum only; write "
            "federated.algorithm=fedavg, or secagg.enabled=false",
        )
    if name == "fedbuff":
        yield (
            ("federated.algorithm", "secagg.enabled"),
            "fedbuff takes updates as they come, and secure aggregation adds those of one round; "
            "write federated.algorithm=fedavg, or secagg.enabled=false",
        )


def _privacy(config: FederatedConfig) -> Iterator[Found]:
    privacy, federated, kind = config.privacy, config.federated, config.privacy.kind
    name = federated.algorithm
    if kind == "none":
        return
    if kind == "example" and name != "fedavg":
        yield (
            ("federated.algorithm", "privacy.kind"),
            f"privacy.kind is 'example', whose clients train by DP-SGD, and {name} trains in "
            "another way; write federated.algorithm=fedavg",
        )
    elif kind != "example" and (name in SEES_EACH or name in _BESIDE_DIFFERENCES):
        yield (
            ("federated.algorithm", "privacy.kind"),
            f"privacy.kind {kind!r} hides users in a sum of clipped differences, which {name} "
            "does not send; write federated.algorithm=fedavg, fedprox, fedavgm, fedadam, fedyogi, "
            "fedadagrad or ditto",
        )
    if kind == "distributed" and not config.secagg.enabled:
        yield (
            ("secagg.enabled", "privacy.kind"),
            "privacy.kind is 'distributed', whose noise is enough in a sum that nobody can take "
            "apart; write secagg.enabled=true, or privacy.kind=local",
        )
    if kind == "local" and config.secagg.enabled:
        yield (
            ("secagg.enabled", "privacy.kind"),
            "privacy.kind 'local' hides updates from the aggregator by noise alone; write "
            "privacy.kind=distributed, which needs much less of it, or secagg.enabled=false",
        )
    if kind in ("distributed", "local") and privacy.sampling_rate != 1:
        yield (
            ("privacy.sampling_rate", "privacy.kind"),
            f"privacy.kind is {kind!r}, and the aggregator knows whom it asks, so drawing clients "
            "hides nobody from it; write privacy.sampling_rate=1",
        )
    if kind == "central" and privacy.sampling_rate < 1 and federated.cohort is not None:
        yield (
            ("federated.cohort", "privacy.sampling_rate"),
            "privacy.sampling_rate draws each client by itself, and federated.cohort draws a fixed "
            "number, which is no such sample; leave one of the two out",
        )


def _net(config: FederatedConfig) -> Iterator[Found]:
    net, data = config.net, config.data
    twice = [name for name, count in Counter(net.parties).items() if count > 1]
    if twice:
        yield (
            ("net.parties",),
            f"net.parties names {twice[0]!r} twice; write each party once",
        )
    if net.topology == "coordinated" and net.aggregator in net.parties:
        yield (
            ("net.aggregator", "net.parties"),
            f"net.aggregator {net.aggregator!r} is one of net.parties too; give it a name of its "
            "own",
        )
    if net.parties and data.format == "digits" and len(net.parties) != data.clients:
        yield (
            ("data.clients", "net.parties"),
            f"data.clients is {data.clients} and net.parties names {len(net.parties)}, each of "
            f"which is a client; write data.clients={len(net.parties)}",
        )
    if net.topology == "ring":
        yield from _ring(config)
    known = {*net.parties, *(() if net.topology == "ring" else (net.aggregator,))}
    for text in net.addresses:
        name, equals, address = text.partition("=")
        host, colon, port = address.rpartition(":")
        if not (equals and colon and host and port.isdecimal() and int(port) < 1 << 16):
            yield (
                ("net.addresses",),
                f"net.addresses has {text!r}; write 'NAME=HOST:PORT', such as "
                "'aggregator=10.0.0.1:7400'",
            )
        elif net.parties and name not in known:
            yield (
                ("net.addresses", "net.parties", "net.aggregator"),
                f"net.addresses has an address of {name!r}, who takes no part; known are "
                f"{', '.join(sorted(known))}",
            )


def _ring(config: FederatedConfig) -> Iterator[Found]:
    name = config.federated.algorithm
    if name in SEES_EACH or name == "fedbuff":
        yield (
            ("federated.algorithm", "net.topology"),
            f"a ring adds up masked shares of a round, and {name} needs single updates; write "
            "federated.algorithm=fedavg, or net.topology=coordinated",
        )
    if config.privacy.kind == "central":
        yield (
            ("privacy.kind", "net.topology"),
            "in a ring there is no aggregator to add central noise; write privacy.kind="
            "distributed, or net.topology=coordinated",
        )
