"""`fedsim deploy register`: registers public keys with the SuperLink, and records which client each belongs to.

The folder `registered` next to the keys stores each client's key and the node that the SuperLink assigned to it.
"""

import json
from collections.abc import Callable
from pathlib import Path

from flwr.common.constant import PUBLIC_KEY_ALREADY_IN_USE_MESSAGE

from fedsim.deploy.flower import flwr
from fedsim.errors import UserError
from fedsim.files import atomic_write_json

KEYS, REGISTERED = "keys", "registered"
NODE, KEY = "node-id", "public-key"


def register(server: Path, superlink: str, tell: Callable[[str], None] = lambda line: None) -> None:
    """Registers the keys of a federation's `server` folder with the running SuperLink, and reports one line per client.

    A replaced key is unregistered; all keys are registered again if the SuperLink has lost its database. May be interrupted and repeated at
    any point. Raises UserError if the SuperLink does not answer or rejects a key.
    """
    folder = server / REGISTERED
    folder.mkdir(exist_ok=True)
    keys = sorted((server / KEYS).glob("*.pub"))
    if not keys:
        raise UserError(f"Expected public keys in {server / KEYS}, got none. Give the server's folder of a federation.")
    live, written = _live(superlink), _recorded(folder)
    for path in keys:
        name, key = path.stem, path.read_text()
        node, known = written.get(name, (None, None))
        if known == key and node in live:
            tell(f"{name}: registered before")
            continue
        if node in live:
            flwr("supernode", "unregister", str(node), superlink)
        new = _admit(path, superlink, {node for node, _ in written.values()})
        written[name] = new, key
        atomic_write_json(folder / f"{name}.json", {NODE: str(new), KEY: key})
        tell(f"{name}: registered{'; its earlier key is revoked' if node in live else ''}")


def registered_names(registered: Path) -> dict[int, str]:
    """Returns the clients' names by node, as recorded by `register`."""
    return {node: name for name, (node, _) in _recorded(registered).items()}


def registered_clients(registered: Path) -> dict[int, int]:
    """Returns the clients' numbers by node, for those registered as client-<number>."""
    numbers = ((node, name.removeprefix("client-")) for node, name in registered_names(registered).items() if name.startswith("client-"))
    return {node: int(number) for node, number in numbers if number.isdecimal()}


def _admit(path: Path, superlink: str, named: set[int]) -> int:
    """Registers a key if necessary and returns its node. `named` are the nodes whose client is known."""
    try:
        return int(flwr("supernode", "register", str(path), superlink, "--name", path.stem)["node-id"])
    except UserError as error:
        if PUBLIC_KEY_ALREADY_IN_USE_MESSAGE not in str(error):
            raise
    unnamed = sorted(_live(superlink) - named)  # the key was registered, but its node was not recorded
    if len(unnamed) == 1:
        return unnamed[0]
    raise UserError(
        f"{path.stem}: the SuperLink knows its key, but as which node is not written down ({len(unnamed)} are of no client here), and it "
        f"takes no key twice. In the folder of `fedsim deploy init` remove server/keys/{path.name} and clients/{path.stem}/key, run it "
        "again, and copy both to their machines."
    )


def _live(superlink: str) -> set[int]:
    """Returns the nodes that the SuperLink admits."""
    return {int(node["node-id"]) for node in flwr("supernode", "list", superlink)["nodes"] if node["status"] != "unregistered"}


def _recorded(registered: Path) -> dict[str, tuple[int, str]]:
    """Returns (node, key) by the client's name. Raises UserError for a file that lacks either."""
    found = {}
    for path in registered.glob("*.json"):
        try:
            values = json.loads(path.read_bytes())
            found[path.stem] = int(values[NODE]), str(values[KEY])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: expected {NODE} and {KEY}. Remove it and run `fedsim deploy register` again.") from error
    return found
