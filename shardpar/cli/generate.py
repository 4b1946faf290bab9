"""`shardpar generate`: text from a trained model."""

from __future__ import annotations

from typing import Annotated

import typer

from shardpar.cli.arguments import Devices, Json
from shardpar.cli.later import later


def generate(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="A run directory, or a directory of runs: its newest."),
    ],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")] = "The ",
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="Tokens to add.")] = 200,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")
    ] = 0.8,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="Sample among so many.", show_default=False)
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=2**32 - 1, help="The same seed gives the same text.")
    ] = 0,
    step: Annotated[
        int | None,
        typer.Option("--step", min=0, help="Which checkpoint; the newest whole one if not given."),
    ] = None,
    devices: Devices = None,
    json: Json = False,
) -> None:
    """Continue a text with a trained model.

    Examples:

        shardpar generate runs/gpt --prompt "A list is" --tokens 100

        shardpar generate runs/gpt --temperature 0 --step 200
    """
    later("sampling").generate(
        run,
        prompt=prompt,
        tokens=tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        step=step,
        devices=devices,
        json=json,
    )
