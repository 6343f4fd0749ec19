"""The group `keys`: Ed25519 pairs for a coordinator or a site that makes its own."""

from pathlib import Path

import click

from common.signing import SigningKey
from coordinator.cli.output import json_option, print_json
from coordinator.services import save_key

_file = click.argument("file", type=click.Path(path_type=Path, dir_okay=False))


@click.group(
    epilog="""\b
Example:
  fedchord keys new signing.key
  fedchord keys show signing.key"""
)
def keys() -> None:
    """Make a signing key, or show its public half.

    `fedchord up` and `fedchord sites add` make keys by themselves. A coordinator without an embedded stack needs one of
    its own, and so does a site whose private key must not travel.
    """


@keys.command(
    epilog="""\b
Example:
  fedchord keys new signing.key"""
)
@_file
@json_option
def new(file: Path, as_json: bool) -> None:
    """Make a pair: write the private key to FILE and print the public key.

    The file can be read by its owner only. It is never written over another one.
    """
    key = SigningKey.generate()
    save_key(key, file)
    _print(file, key, as_json=as_json)


@keys.command(
    epilog="""\b
Example:
  fedchord sites add clinic-b --public-key "$(fedchord keys show signing.key)"
  fedchord keys show signing.key"""
)
@_file
@json_option
def show(file: Path, as_json: bool) -> None:
    """Print the public key that belongs to the private key in FILE."""
    _print(file, SigningKey.load(file), as_json=as_json)


def _print(file: Path, key: SigningKey, *, as_json: bool) -> None:
    if as_json:
        print_json({"file": file, "public_key": key.public_key})
    else:
        click.echo(key.public_key)
