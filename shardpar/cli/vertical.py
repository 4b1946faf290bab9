"""`shardpar fl vertical`: two parties with different columns of the same rows."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from shardpar.cli.arguments import Json
from shardpar.cli.later import later
from shardpar.errors import UserError

vertical = typer.Typer(
    help="""Two parties that have different columns of the same rows train on all of them.

In this order:

1. `shardpar fl vertical rehearse GUEST.csv HOST.csv` runs both parties as processes of this
machine, to choose model and options on data that may be shared.

2. Each party makes its keys (`shardpar fl keys` shows which files).

3. `shardpar fl vertical train` at both, at the same time. The one with `--label` is the guest.
They find the rows they have in common, and train; each gets its half of the model.

4. `shardpar fl vertical predict` at both, for new rows.""",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Model = Literal["logistic", "linear", "trees"]
Data = Annotated[str, typer.Argument(metavar="DATA.csv", help="This party's table, with a header.")]
Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Options of the model, such as `epochs=5` or `max_depth=3`; the same at both.",
        show_default=False,
    ),
]
Party = Annotated[str, typer.Option("--party", metavar="NAME", help="Who this is.")]
Peer = Annotated[
    str,
    typer.Option(
        "--peer", metavar="NAME[=HOST:PORT]", help="The other, and where it listens if it does."
    ),
]
Listen = Annotated[
    str | None,
    typer.Option("--listen", metavar="HOST:PORT", help="Where this party listens, if it does."),
]
Keys = Annotated[str, typer.Option("--keys", metavar="DIR", help="Where this party's keys are.")]
Id = Annotated[str, typer.Option("--id", metavar="COLUMN", help="Rows are aligned by it.")]
Label = Annotated[
    str | None,
    typer.Option("--label", metavar="COLUMN", help="What is learned; only the guest has it."),
]
Kind = Annotated[Model, typer.Option("--model", help="What is trained.")]
Job = Annotated[str, typer.Option("--job", metavar="NAME", help="The same at both.")]
Scheme = Annotated[
    Literal["paillier", "okamoto_uchiyama"],
    typer.Option(
        "--scheme", help="okamoto_uchiyama is faster, and loses its key to a party that cheats."
    ),
]
KeyBits = Annotated[int, typer.Option("--key-bits", help="2048, or 3072 beyond 2030.")]
Processes = Annotated[
    int | None, typer.Option("--processes", min=1, help="That encrypt; one per core by default.")
]


def _training() -> Any:
    """The heavy half of the verbs.

    Raises:
      UserError: the extra is not installed.
    """
    try:
        return later("vertical_training")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in {"grpc", "cryptography", "gmpy2"}:
            raise
        raise UserError(f"{error.name} is not installed; run: pip install 'shardpar[fl]'") from None


@vertical.command()
def train(
    data: Data,
    party: Party,
    peer: Peer,
    keys: Keys,
    settings: Settings = None,
    out: Annotated[
        str, typer.Option("--out", metavar="FILE", help="This party's half of the model.")
    ] = "half.model",
    id_: Id = "id",
    label: Label = None,
    model: Kind = "logistic",
    listen: Listen = None,
    job: Job = "vertical",
    scheme: Scheme = "paillier",
    key_bits: KeyBits = 2048,
    processes: Processes = None,
    json: Json = False,
) -> None:
    """Find the rows that both parties have, and train on them.

    One of the two listens, the other names its address.

    Examples:

        shardpar fl vertical train bank.csv --party bank --peer shop --listen 0.0.0.0:7443
        --keys keys --label default --model trees trees=50 --out bank.model

        shardpar fl vertical train shop.csv --party shop --peer bank=bank.example:7443
        --keys keys --model trees trees=50 --out shop.model
    """
    training = _training()
    end = training.End(party, peer, listen, keys, job)
    how = training.how(scheme, key_bits, processes)
    training.train(data, end, how, settings or [], out, id_, label, model, json=json)


@vertical.command()
def predict(
    data: Data,
    half: Annotated[
        str, typer.Option("--half", metavar="FILE", help="This party's half of the model.")
    ],
    party: Party,
    peer: Peer,
    keys: Keys,
    out: Annotated[
        str, typer.Option("--out", metavar="FILE.csv", help="Ids and predictions, at the guest.")
    ] = "predictions.csv",
    id_: Id = "id",
    label: Label = None,
    listen: Listen = None,
    job: Job = "vertical",
    scheme: Scheme = "paillier",
    key_bits: KeyBits = 2048,
    processes: Processes = None,
    json: Json = False,
) -> None:
    """Predict rows that both parties have; the guest gets the predictions.

    With --label the guest says how good they are.

    Examples:

        shardpar fl vertical predict new.csv --half bank.model --party bank --peer shop
        --listen 0.0.0.0:7443 --keys keys

        shardpar fl vertical predict new.csv --half shop.model --party shop
        --peer bank=bank.example:7443 --keys keys
    """
    training = _training()
    end = training.End(party, peer, listen, keys, job)
    how = training.how(scheme, key_bits, processes)
    training.predict(data, half, end, how, out, id_, label, json=json)


@vertical.command()
def rehearse(
    guest: Annotated[str, typer.Argument(metavar="GUEST.csv", help="With the label.")],
    host: Annotated[str, typer.Argument(metavar="HOST.csv", help="Without.")],
    label: Annotated[str, typer.Option("--label", metavar="COLUMN", help="What is learned.")],
    settings: Settings = None,
    out: Annotated[
        str, typer.Option("--out", metavar="DIR", help="Where halves and logs go.")
    ] = "runs/vertical",
    id_: Id = "id",
    model: Kind = "logistic",
    test: Annotated[
        tuple[str, str] | None,
        typer.Option("--test", metavar="GUEST.csv HOST.csv", help="Tables to predict afterwards."),
    ] = None,
    scheme: Scheme = "paillier",
    key_bits: KeyBits = 2048,
    processes: Processes = None,
    json: Json = False,
) -> None:
    """Run both parties as processes on this machine, with keys for tests.

    Prints what the guest prints; the host's lines are in DIR/host.log.

    Examples:

        shardpar fl vertical rehearse bank.csv shop.csv --label default --model trees trees=20
        --test bank_new.csv shop_new.csv
    """
    flags = ["--id", id_, "--scheme", scheme, "--key-bits", str(key_bits)]
    flags += ["--processes", str(processes)] if processes else []
    code = _training().rehearse(
        (guest, host), test, label, model, settings or [], out, flags, json=json
    )
    raise typer.Exit(code)
