"""The Flower ClientApp. It is thin: it imports no torch, and knows no kinds of messages.

In a deployment Flower starts it anew for each message; it hands the message to the client's worker, a process that stays. In a simulation
the work is done where the app is. Either way it is `fedsim.flower.worker.handle` that does it.
"""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

CLIENT_FILE = "client-file"
"""Key in the SuperNode's --node-config that names the owner's file; without it the work is done here."""


class FedsimClientApp(ClientApp):
    """A ClientApp that hands every message on, whatever its type."""

    def __call__(self, message: Message, context: Context) -> Message:
        if CLIENT_FILE in context.node_config:
            from clients.forwarding import forward

            return forward(message, context, str(context.node_config[CLIENT_FILE]))
        from fedsim.flower.worker import handle

        return handle(message, context)


app = FedsimClientApp()
