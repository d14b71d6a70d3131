"""The Flower ClientApp. It is thin: it does not import torch, and knows no message types.

In a deployment Flower starts it for each message, and it forwards the message to the client's worker, a long-running process. In a
simulation it does the work itself. Either way `fedsim.flower.worker.handle` does the work.
"""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

CLIENT_FILE = "client-file"
"""Key in the SuperNode's --node-config that names the owner's file; without it the app does the work itself."""


class FedsimClientApp(ClientApp):
    """A ClientApp that passes on every message, whatever its type."""

    def __call__(self, message: Message, context: Context) -> Message:
        if CLIENT_FILE in context.node_config:
            from clients.forwarding import forward

            return forward(message, context, str(context.node_config[CLIENT_FILE]))
        from fedsim.flower.worker import handle

        return handle(message, context)


app = FedsimClientApp()
