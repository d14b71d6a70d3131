"""The Flower ClientApp. It is thin: torch and the model are imported when a message asks for work.

It knows no kinds of messages: each goes as it is to `fedsim.flower.worker.handle`, which knows them all.
"""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp


class FedsimClientApp(ClientApp):
    """A ClientApp that hands every message on, whatever its type."""

    def __call__(self, message: Message, context: Context) -> Message:
        from fedsim.flower.worker import handle

        return handle(message, context)


app = FedsimClientApp()
